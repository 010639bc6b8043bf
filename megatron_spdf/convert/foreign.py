"""Looks at weights that another tool made, before they become weights of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def require_finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Returns a tensor of `path` unchanged.

    Raises:
        ValueError: it has entries that are not numbers, or none in float32.
    """
    finite = torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor)
    if finite.all():
        return tensor
    first = tuple(torch.nonzero(~finite)[0].tolist())
    raise ValueError(f"{path}: {name} has {int((~finite).sum()):,} entries that are not finite "
                     f"numbers, the first of them {tensor[first].item()} at {list(first)}; use a "
                     "model that has not diverged, or copy the file again")
