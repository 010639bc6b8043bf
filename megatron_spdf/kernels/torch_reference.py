"""Expand and compress in PyTorch, driven by the positions of the active entries; what the other
kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spdf.kernels.mask import Mask, positions


def make_index(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """Positions of the active entries in the row-major dense weight: (n,).

    Scatter takes int64. On CUDA four bytes an entry are kept and widened for the moment of use; on
    CPU memory is plenty and the widening would cost more than the scatter.
    """
    found = positions(bits, slice_shape, axis)
    wide = bits.device.type == "cpu" or bits.numel() * 8 > torch.iinfo(torch.int32).max
    return found if wide else found.int()


def expand(values: Tensor, mask: Mask) -> Tensor:
    """The dense weight: active values at their positions, zero elsewhere.

    Args:
        values: active values, any shape, n elements.
    """
    weight = torch.zeros(mask.shape[0] * mask.shape[1], dtype=values.dtype, device=values.device)
    return weight.scatter_(0, _positions(mask).long(), values.reshape(-1)).view(mask.shape)


def compress(dense: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
    """The entries of a dense weight, or of its gradient, at the active positions: (slices, active
    per slice).

    Args:
        out: what they are added to, in place, in its own precision.
    """
    found = dense.reshape(-1).index_select(0, _positions(mask)).view(mask.slices, mask.active)
    return found if out is None else out.add_(found)


def _positions(mask: Mask) -> Tensor:
    """The index, which is one of positions unless the mask was made for kernels that do not take
    this dtype."""
    if mask.index.dim() == 1:
        return mask.index
    return positions(mask.bits, mask.slice_shape, mask.axis)
