"""Between a dense weight and the slices it is cut into along its tensor-parallel axis."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spdf.sparsity.plan import SparseWeight


def slice_of(weight: Tensor, planned: SparseWeight, slice_id: int) -> Tensor:
    """Entries of one slice of a dense weight (out, in), in row-major order: (entries,)."""
    size = planned.slice_shape[planned.axis]
    return weight.narrow(planned.axis, slice_id * size, size).reshape(-1)


def join_slices(slices: Tensor, planned: SparseWeight) -> Tensor:
    """Dense weight (out, in) from its slices (C, entries)."""
    return torch.cat(list(slices.view(planned.slices, *planned.slice_shape)), dim=planned.axis)
