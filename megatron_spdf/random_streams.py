"""Counter-based random streams keyed by words, the same on every rank and layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the planner goes without PyTorch
    import torch
    from torch import Tensor


def stream_key(*words: object) -> np.ndarray:
    """128-bit Philox key of a tuple of words, (2,) uint64."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8")


def random_words(keys: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The first words of the streams of some 64-bit keys, (keys, count) int64, the same on every
    device: SplitMix64 (Steele et al. 2014).

    Args:
        keys: under 2^64; other keys, other streams.
    """
    import torch

    steps = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    steps.mul_(_signed(0x9E3779B97F4A7C15))
    # to a device the copy goes without waiting for what it still has to do
    starts = torch.tensor([[_signed(key)] for key in keys]).to(device, non_blocking=True)
    words = steps + starts
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, 31))


def _signed(word: int) -> int:
    """The int64 with the same bits as a word of 64."""
    return word - (word >> 63 << 64)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shifts to the right, filling with zeros, where PyTorch fills with the sign."""
    return (words >> by).bitwise_and_(2 ** (64 - by) - 1)
