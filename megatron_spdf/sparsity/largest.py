"""Masks of the largest magnitudes, of all slices at once, on their device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def keep_largest(magnitudes: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, ties by position: (rows, entries) bool.

    Args:
        magnitudes: (rows, entries) fp32, not negative.
    """
    threshold = _at_rank(magnitudes, count)
    above, ties = magnitudes > threshold, magnitudes == threshold
    left = count - above.sum(-1, keepdim=True)
    return above | ties & (ties.cumsum(-1, dtype=torch.int32) <= left)


def _at_rank(magnitudes: Tensor, count: int) -> Tensor:
    """The `count`th largest of each row, (rows, 1)."""
    if magnitudes.device.type != "cpu":
        return magnitudes.topk(count, sorted=False).values.amin(-1, keepdim=True)
    place = magnitudes.shape[-1] - count  # NumPy selects several times as fast as PyTorch
    found = np.partition(magnitudes.numpy(), place, axis=-1)[:, place]
    return torch.from_numpy(found).unsqueeze(-1)
