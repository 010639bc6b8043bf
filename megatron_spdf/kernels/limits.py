"""Limits of the kernels for GPUs, known without PyTorch."""

from __future__ import annotations

# Sides of the tiles that kernels multiply with, in powers of two. Weights of other tiles are
# expanded. Tensor cores have no smaller tile, and the sums of a larger one do not fit in registers.
SMALLEST, LARGEST = 16, 128

LARGEST_NORM = 16384  # entries of a token that a program of a norm has in registers
LARGEST_SELECTION = 2**30  # entries of a row, which are counted in 32 bits


def has_tile_kernel(size: int) -> bool:
    """True if kernels for GPUs multiply with tiles of `size` x `size`."""
    return SMALLEST <= size <= LARGEST and size & (size - 1) == 0