"""Kernels of compact weights: expand, compress, and products with tiles and 2:4 weights."""
