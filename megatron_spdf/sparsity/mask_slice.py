"""What an algorithm sees of a slice whose mask is due to move, or of all slices of a weight.

All of it runs on the device of the mask, in whole numbers or by comparing floats, so that every
replica comes to the same mask.

Letters: n units of a slice, k of them active. A unit is what dies or is born as a whole: an entry,
or a tile where the pattern is of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_spdf.random_streams import random_words, stream_key
from megatron_spdf.sparsity.largest import smallest_at_rank
from megatron_spdf.sparsity.patterns.base import Pattern, Shape
from megatron_spdf.sparsity.patterns.unstructured import Unstructured

STREAM = "megatron_spdf move stream 1"


@dataclass(frozen=True)
class MaskSlice:
    """One slice of a weight as an algorithm sees it when its mask is due to move.

    Attributes:
        name, number: of the weight, and of the slice in it.
        mask: (n,) bool, its active units in row-major order.
        values: (k,) fp32 master values in the order of `active`, if the algorithm needs values; of
            tiles the sums of their magnitudes.
        gradient: (n,) fp32, of the loss of the whole batch with respect to the dense weight, if the
            algorithm needs that; of tiles its norms.
        seed, update: with name and number they determine the random words.
        active_at: share of the weight's level -> number of entries of a slice that are active.
        pattern: of the weight.
        grid: (rows, columns) of units in the slice; None: one row.
        units: k, where it is known: positions are found without waiting for their number then.
    """

    name: str
    number: int
    mask: Tensor
    values: Tensor | None
    gradient: Tensor | None
    seed: int
    update: int
    active_at: Callable[[float], int] | None = None
    pattern: Pattern = Unstructured()
    grid: Shape | None = None
    units: int | None = None

    @cached_property
    def active(self) -> Tensor:
        """(k,) positions of the active units, ascending."""
        return _positions(self.mask, self.units)

    @cached_property
    def inactive(self) -> Tensor:
        """(n - k,) positions of the others, ascending."""
        return _positions(~self.mask, None if self.units is None else self.rest)

    @property
    def rest(self) -> int:
        """n - k."""
        return len(self.inactive) if self.units is None else len(self.mask) - self.units

    @property
    def alone(self) -> MaskSlices:
        """This slice and no other."""
        return MaskSlices([self])

    def random(self, purpose: str, candidates: Tensor, count: int) -> Tensor:
        """Draws `count` of the candidates, every such set equally likely.

        Args:
            purpose: other words, other draws.
            candidates: positions.
        """
        return self.lowest(self.random_scores(purpose, candidates), candidates, count)

    def random_scores(self, purpose: str, candidates: Tensor) -> Tensor:
        """A random word for each of the candidates, int64; see `random`."""
        return random_words([self.key(purpose)], len(candidates), candidates.device)[0]

    def key(self, purpose: str) -> int:
        """The key of a stream of random words."""
        return int(stream_key(STREAM, self.seed, self.name, self.number, self.update, purpose)[0])

    def exchange(self, to_die: Tensor, to_be_born: Tensor,
                 count: int) -> tuple[Tensor, Tensor]:
        """Chooses `count` active units that die and as many others that are born, those with the
        lowest scores, ties by position; where the pattern ties units to each other, those that it
        allows, which may be fewer.

        Args:
            to_die: (k,) scores of the active units.
            to_be_born: (n - k,) scores of the others.

        Returns:
            Positions of those that die, and of those that are born.
        """
        if not self.pattern.exchanges:
            return (self.lowest(to_die, self.active, count),
                    self.lowest(to_be_born, self.inactive, count))
        died, born = self.pattern.exchange(
            self.mask.view(self.grid).cpu().numpy(), to_die.double().cpu().numpy(),
            to_be_born.double().cpu().numpy(), count)
        return (torch.from_numpy(died).to(self.mask.device),
                torch.from_numpy(born).to(self.mask.device))

    def lowest(self, scores: Tensor, candidates: Tensor, count: int) -> Tensor:
        """The `count` candidates with the lowest scores, ties by position.

        Args:
            scores: one for each of the candidates, whose positions ascend.
        """
        if count == 0:
            return candidates[:0]
        threshold = smallest_at_rank(scores, count, selects_alone=not scores.is_cuda)
        below, ties = candidates[scores < threshold], candidates[scores == threshold]
        return torch.cat([below, ties[: count - len(below)]])


@dataclass(frozen=True)
class MaskSlices:
    """Slices of a weight, C of them, in kernels that are as many for all as for one.

    Attributes:
        parts: each slice.
    """

    parts: Sequence[MaskSlice]

    def random_scores(self, purpose: str) -> Tensor:
        """A random word for each inactive unit, (C, n - k) int64; see `MaskSlice.random`."""
        one = self.parts[0]
        return random_words([part.key(purpose) for part in self.parts], one.rest, one.mask.device)

    def inactive_gradients(self) -> Tensor:
        """Gradients of the inactive units in the order of their positions, (C, n - k)."""
        inactive = _positions(~torch.cat([part.mask for part in self.parts]),
                              len(self.parts) * self.parts[0].rest)
        gradients = torch.cat([part.gradient for part in self.parts])
        return gradients[inactive].view(len(self.parts), -1)


def _positions(mask: Tensor, count: int | None) -> Tensor:
    """Of the entries that are set, ascending, whose number may be known."""
    found = mask.nonzero() if count is None else mask.nonzero_static(size=count)
    return found.view(-1)
