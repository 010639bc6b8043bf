"""Unstructured masks: every set of as many entries of a slice is equally likely.

Random masks come from a counter-based stream keyed by (seed, weight name, slice).

A slice's mask depends on nothing else: not on the layout, not on the rank, not on what was drawn
before. So every rank draws its own slices without communication, and the mask is the same at every
layout. Philox's raw words are covered by NumPy's stream-compatibility promise, which its
distributions are not; stored hashes in the tests hold the stream to what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Philox

from megatron_spdf.random_streams import stream_key
from megatron_spdf.sparsity.patterns.base import PATTERNS, Pattern, Shape

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

STREAM = "megatron_spdf mask stream 1"


class Unstructured(Pattern):
    """Any entries."""

    name = "unstructured"
    moving_unit = (1, 1)
    columns_together = 1

    def draw(self, seed: int, name: str, slice_id: int, shape: Shape, level: float) -> np.ndarray:
        numel, active = shape[0] * shape[1], self.active(shape, level)
        return draw_mask(seed, name, slice_id, numel, active).reshape(shape)

    def largest(self, values: np.ndarray, level: float) -> np.ndarray:
        active = self.active(values.shape, level)
        return largest_mask(values.reshape(-1), active).reshape(values.shape)

    def chosen(self, magnitudes: Tensor, level: float) -> Tensor:
        from megatron_spdf.sparsity.largest import keep_largest

        active = self.active(magnitudes.shape[1:], level)
        return keep_largest(magnitudes.flatten(1), active).view_as(magnitudes)

    def fill_chosen(self, values: Tensor, level: float, bits: Tensor,
                    *more: tuple[int, Tensor]) -> Tensor:
        from megatron_spdf.sparsity.largest import fill_largest

        active = self.active(values.shape[1:], level)
        return fill_largest(values.flatten(1), [(active, bits), *more])


def draw_mask(seed: int, name: str, slice_id: int, numel: int, active: int) -> np.ndarray:
    """The mask of one slice with exactly `active` entries set, every such mask equally likely.

    Each entry gets a random 32-bit word and the `active` smallest are set, ties by position.

    Args:
        numel: entries of the slice, in row-major order.

    Returns:
        (numel,) bool.
    """
    assert 0 < active <= numel, (active, numel)
    words = Philox(key=stream_key(STREAM, seed, name, slice_id)).random_raw((numel + 1) // 2)
    return _smallest(words.astype("<u8", copy=False).view("<u4")[:numel], active)


def largest_mask(values: np.ndarray, active: int) -> np.ndarray:
    """The mask of the `active` largest magnitudes of a slice, ties by position.

    Args:
        values: (numel,), floating point.
    """
    assert 0 < active <= values.size, (active, values.size)
    return _smallest(-np.abs(values), active)


def _smallest(keys: np.ndarray, active: int) -> np.ndarray:
    threshold = np.partition(keys, active - 1)[active - 1]
    mask = keys < threshold
    ties = np.flatnonzero(keys == threshold)
    mask[ties[: active - np.count_nonzero(mask)]] = True
    return mask


PATTERNS.register(Unstructured.name, Unstructured)
