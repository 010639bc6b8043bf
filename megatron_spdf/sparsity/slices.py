"""Between a dense weight and the chunks it is cut into along its tensor-parallel axis."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.sparsity.masks import draw_mask
from megatron_spdf.sparsity.patterns.tiles import draw_block_mask
from megatron_spdf.sparsity.patterns.two_four import draw_two_four, is_two_four
from megatron_spdf.sparsity.plan import SparseWeight


def planned_mask(planned: SparseWeight, seed: int, chunk: int) -> np.ndarray:
    """The mask that the plan draws for one chunk: (entries,) bool, in row-major order."""
    if planned.two_four:
        return draw_two_four(seed, planned.name, chunk, planned.chunk_shape).reshape(-1)
    if planned.block is None:
        return draw_mask(seed, planned.name, chunk, math.prod(planned.chunk_shape), planned.active_per_chunk)
    grid = draw_block_mask(seed, planned.name, chunk, planned.grid, planned.per_row)
    return grid.repeat(planned.block, 0).repeat(planned.block, 1).reshape(-1)


def follows_pattern(masks: np.ndarray, planned: SparseWeight) -> bool:
    """Whether masks of chunks, (chunks, entries) bool, are of balanced blocks, or 2:4, as planned; without these any
    do."""
    if planned.two_four:
        return is_two_four(masks, planned.chunk_shape)
    if planned.block is None:
        return True
    (rows, columns), size = planned.grid, planned.block
    inside = masks.reshape(len(masks), rows, size, columns, size).sum((2, 4), dtype=np.int64)
    active = inside > 0
    return bool((inside[active] == size**2).all() and (active.sum(2) == planned.per_row).all()
                and (active.sum(1) == planned.per_row * rows // columns).all())


def chunk_of(weight: Tensor, planned: SparseWeight, number: int) -> Tensor:
    """Entries of one chunk of a dense weight (out, in), in row-major order: (entries,)."""
    size = planned.chunk_shape[planned.axis]
    return weight.narrow(planned.axis, number * size, size).reshape(-1)


def join_chunks(chunks: Tensor, planned: SparseWeight) -> Tensor:
    """Dense weight (out, in) from its chunks (C, entries)."""
    return torch.cat(list(chunks.view(planned.chunks, *planned.chunk_shape)), dim=planned.axis)
