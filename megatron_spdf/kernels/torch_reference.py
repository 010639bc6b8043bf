"""Expand and compress in PyTorch, driven by the positions of the active entries."""

from __future__ import annotations

import torch
from torch import Tensor


def make_index(positions: Tensor, device: torch.device | str) -> Tensor:
    """Positions of the active entries in the row-major dense weight, as the kernels want them.

    Scatter takes int64. On CUDA four bytes an entry are kept and widened for the moment of use; on CPU memory is
    plenty and the widening would cost more than the scatter.
    """
    wide = torch.device(device).type == "cpu" or positions.numel() > torch.iinfo(torch.int32).max
    return positions.to(device=device, dtype=torch.int64 if wide else torch.int32)


def expand(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense weight: active values at their positions, zero elsewhere.

    Args:
        values: active values, any shape, n elements.
        index: (n,) from `make_index`.
        shape: (out, in) of the dense weight.
    """
    weight = torch.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    return weight.scatter_(0, index.long(), values.reshape(-1)).view(shape)


def compress(dense: Tensor, index: Tensor) -> Tensor:
    """The entries of a dense weight, or of its gradient, at the active positions: (n,)."""
    return dense.reshape(-1).index_select(0, index)
