"""Patterns of masks, one file each."""
