"""What the kernels for GPUs take, known without PyTorch."""

from __future__ import annotations

# TileTable that kernels multiply with, in powers of two; others are expanded. Below, tensor cores
# have no such tile; above, sums leave the registers.
SMALLEST, LARGEST = 16, 128


def multiplied(size: int) -> bool:
    """Whether kernels for GPUs multiply with tiles of this size."""
    return SMALLEST <= size <= LARGEST and size & (size - 1) == 0
