"""Mask algorithms, one file each."""
