"""What became of masks while they moved: entries moved, overlap with the first mask, ages.

The first mask is that of the beginning of the stage of a run. A rank keeps its bits, 1/8 byte for
an entry of a weight, so that overlap is exact wherever masks come from and whatever layout a run
resumes at. Ages cost a byte for an active entry, and are kept if the recipe asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from megatron_spdf.kernels.mask import ones
from megatron_spdf.sparsity.moving import Carrier

OLDEST = 255  # moves, that old or older


@dataclass(frozen=True)
class Change:
    """A move of the mask of a weight, or of several weights together, in entries: numbers, or
    tensors () with them, for which nobody has waited yet.

    Attributes:
        moved: that died; as many were born, or they are held at zero.
        active: after the move, those that are held at zero included.
        as_first: of the active ones, those that were active at the beginning of the stage; 0 where
            that is not known.
        age: sum over the active ones of the moves since each was born, or since the beginning of
            the stage; 0 where that is not known.
    """

    moved: int | Tensor
    active: int
    as_first: int | Tensor = 0
    age: int | Tensor = 0

    @property
    def share(self) -> float:
        """Share of the active entries that moved."""
        return self.moved / self.active

    @property
    def overlap(self) -> float:
        """Share of the active entries that the first mask has."""
        return self.as_first / self.active

    @property
    def mean_age(self) -> float:
        """Mean age of active entries, in moves."""
        return self.age / self.active

    def __add__(self, other: Change) -> Change:
        return Change(*map(sum, zip(astuple(self), astuple(other), strict=True)))


NOTHING = Change(0, 0)


def by_layer(changes: Mapping[str, Change], layers: Mapping[str, int]) -> dict[int, Change]:
    """Changes of the weights of each layer together, by the number of the layer.

    Args:
        changes: of weights.
        layers: number of the layer of each weight.
    """
    together: dict[int, Change] = {}
    for name, change in changes.items():
        number = layers[name]
        together[number] = together[number] + change if number in together else change
    return dict(sorted(together.items()))


def common(first: Tensor, bits: Tensor) -> Tensor:
    """The number of entries that are active in both of two masks, packed bits of slices, ()."""
    return ones(first & bits).sum()


def aged(ages: Tensor, carry: Carrier) -> Tensor:
    """Ages of active entries after a move: 0 of those that are born, one more of the others.

    Args:
        ages: (slices, k) uint8, before the move.
    """
    # as floats, which every backend's kernels carry
    carried, stayed = carry(ages.float()).to(ages.dtype), carry(torch.ones_like(ages).float())
    return torch.where(stayed.bool() & (carried < OLDEST), carried + 1, carried)
