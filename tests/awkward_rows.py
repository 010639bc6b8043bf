"""Rows of which the largest or the lowest entries are selected, and those entries."""

from __future__ import annotations

import torch
from torch import Tensor


def awkward(entries: int, dtype: torch.dtype) -> Tensor:
    """Rows with infinities and values of all sizes, with many ties, of zeros of both signs, and of
    one value: (4, entries)."""
    rows = torch.randn(4, entries, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0] *= 10.0 ** torch.linspace(-6, 4, entries)
    rows[0, 3::50], rows[0, 7::90] = torch.inf, -torch.inf
    rows[1] = (3 * rows[1]).round()
    rows[1, ::3] *= -1.0
    rows[2, ::2], rows[2, 1::3], rows[3] = 0.0, -0.0, -2.5
    return rows.to(dtype)


def first_of(order: Tensor, count: int) -> Tensor:
    """The mask of the first entries of an order of rows."""
    mask = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    return mask.scatter_(1, order[:, :count], True)
