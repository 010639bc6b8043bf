"""Between a dense weight and the slices it is cut into along its tensor-parallel axis."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.sparsity.masks import draw_mask
from megatron_spdf.sparsity.patterns.tiles import draw_tile_mask
from megatron_spdf.sparsity.patterns.two_four import draw_two_four, is_two_four
from megatron_spdf.sparsity.plan import SparseWeight


def planned_mask(planned: SparseWeight, seed: int, slice_id: int) -> np.ndarray:
    """The mask that the plan draws for one slice: (entries,) bool, in row-major order."""
    if planned.two_four:
        return draw_two_four(seed, planned.name, slice_id, planned.slice_shape).reshape(-1)
    if planned.tile is None:
        return draw_mask(seed, planned.name, slice_id, math.prod(planned.slice_shape),
                         planned.active_per_slice)
    grid = draw_tile_mask(seed, planned.name, slice_id, planned.grid, planned.per_row)
    return grid.repeat(planned.tile, 0).repeat(planned.tile, 1).reshape(-1)


def follows_pattern(masks: np.ndarray, planned: SparseWeight) -> bool:
    """Whether masks of slices, (slices, entries) bool, are of balanced tiles, or 2:4, as planned;
    without these any do."""
    if planned.two_four:
        return is_two_four(masks, planned.slice_shape)
    if planned.tile is None:
        return True
    (rows, columns), size = planned.grid, planned.tile
    inside = masks.reshape(len(masks), rows, size, columns, size).sum((2, 4), dtype=np.int64)
    active = inside > 0
    return bool((inside[active] == size**2).all() and (active.sum(2) == planned.per_row).all()
                and (active.sum(1) == planned.per_row * rows // columns).all())


def slice_of(weight: Tensor, planned: SparseWeight, slice_id: int) -> Tensor:
    """Entries of one slice of a dense weight (out, in), in row-major order: (entries,)."""
    size = planned.slice_shape[planned.axis]
    return weight.narrow(planned.axis, slice_id * size, size).reshape(-1)


def join_slices(slices: Tensor, planned: SparseWeight) -> Tensor:
    """Dense weight (out, in) from its slices (C, entries)."""
    return torch.cat(list(slices.view(planned.slices, *planned.slice_shape)), dim=planned.axis)
