"""Masks for tests of kernels, and where these run: on a GPU, or on the CPU, Triton's in its
interpreter."""

from __future__ import annotations

import numpy as np
import torch

from megatron_spdf.kernels.mask import Mask
from megatron_spdf.kernels.tiles import find_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The unit in the last place of a result, relative: sums are fp32 and rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NO_TRITON = "triton is not installed; PyTorch for CUDA brings it"


def make_mask(active: np.ndarray, axis: int, module, size: int | None = None) -> Mask:
    """Of slices (C, rows, columns) bool with equally many active entries."""
    slices, rows, columns = active.shape
    bits = torch.from_numpy(np.packbits(active.reshape(slices, -1), axis=1)).to(DEVICE)
    shape = (slices * rows, columns) if axis == 0 else (rows, slices * columns)
    tiles = None if size is None else find_tiles(bits, (rows, columns), axis, size)
    return Mask(bits, module.make_index(bits, (rows, columns), axis), shape, (rows, columns), axis,
                int(active[0].sum()), tiles)


def whole(active: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate(list(active), axis=axis)


def random_slices(slices: int, rows: int, columns: int, k: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(rows * columns) < k
                     for _ in range(slices)]).reshape(slices, rows, columns)
