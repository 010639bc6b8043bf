"""What an algorithm sees of a slice whose mask is due to move.

All of it runs on the device of the mask, in whole numbers or by comparing floats, so that every
replica comes to the same mask.

Letters: n entries of a slice, k of them active.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_spdf.random_streams import random_words, stream_key

STREAM = "megatron_spdf move stream 1"


@dataclass(frozen=True)
class MaskSlice:
    """One slice of a weight as an algorithm sees it when its mask is due to move.

    Attributes:
        name, number: of the weight, and of the slice in it.
        mask: (n,) bool, its active entries in row-major order.
        values: (k,) fp32 master values in the order of `active`, if the algorithm needs values.
        gradient: (n,) fp32, of the loss of the whole batch with respect to the dense weight, if the
            algorithm needs that.
        seed, update: with name and number they determine the random words.
        active_at: share of the weight's level -> number of entries of a slice that are active.
    """

    name: str
    number: int
    mask: Tensor
    values: Tensor | None
    gradient: Tensor | None
    seed: int
    update: int
    active_at: Callable[[float], int] | None = None

    @cached_property
    def active(self) -> Tensor:
        """(k,) positions of the active entries, ascending."""
        return self.mask.nonzero().view(-1)

    @cached_property
    def inactive(self) -> Tensor:
        """(n - k,) positions of the others, ascending."""
        return (~self.mask).nonzero().view(-1)

    def random(self, purpose: str, candidates: Tensor, count: int) -> Tensor:
        """Draws `count` of the candidates, every such set equally likely.

        Args:
            purpose: other words, other draws.
            candidates: positions.
        """
        key = stream_key(STREAM, self.seed, self.name, self.number, self.update, purpose)
        words = random_words(int(key[0]), len(candidates), candidates.device)
        return self.lowest(words, candidates, count)

    def lowest(self, scores: Tensor, candidates: Tensor, count: int) -> Tensor:
        """The `count` candidates with the lowest scores, ties by position.

        Args:
            scores: one for each of the candidates, whose positions ascend.
        """
        if count == 0:
            return candidates[:0]
        threshold = scores.kthvalue(count).values
        below, ties = candidates[scores < threshold], candidates[scores == threshold]
        return torch.cat([below, ties[: count - len(below)]])
