"""Selectors of the entries of trained weights that stay, one file each."""
