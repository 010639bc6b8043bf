"""The run directory, its log, and grids of runs."""
