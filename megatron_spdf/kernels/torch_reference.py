"""Expand and compress in PyTorch, by the positions of the active entries: the reference for
kernels.

Shapes: n active entries of a weight (out, in), as many in each slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spdf.kernels.mask import Mask, positions


def make_index(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """Positions of the active entries in the row-major dense weight, (n,).

    Scatter needs int64. On CUDA positions are kept in four bytes and widened for the moment of use.
    On CPU memory is plenty, and widening would cost more than the scatter.
    """
    found = positions(bits, slice_shape, axis)
    wide = bits.device.type == "cpu" or bits.numel() * 8 > torch.iinfo(torch.int32).max
    return found if wide else found.int()


def expand(values: Tensor, mask: Mask) -> Tensor:
    """Dense weight (out, in): active values at their positions, zero elsewhere.

    Args:
        values: (slices, active per slice), or any shape of n elements.
    """
    weight = torch.zeros(mask.shape[0] * mask.shape[1], dtype=values.dtype, device=values.device)
    return weight.scatter_(0, _positions(mask).long(), values.reshape(-1)).view(mask.shape)


def compress(dense: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
    """Active entries of a dense weight, or of its gradient: (slices, active per slice).

    Args:
        dense: (out, in).
        out: (slices, active per slice); the entries are added to it in place, in its own precision.
    """
    found = dense.reshape(-1).index_select(0, _positions(mask)).view(mask.slices, mask.active)
    return found if out is None else out.add_(found)


def _positions(mask: Mask) -> Tensor:
    """Positions of the active entries, (n,).

    They are the mask's index, unless that was made for Triton, whose kernels do not support this
    dtype.
    """
    if mask.index.dim() == 1:
        return mask.index
    return positions(mask.bits, mask.slice_shape, mask.axis)
