"""Products with the values of a compact weight, one file for each pattern that has one."""
