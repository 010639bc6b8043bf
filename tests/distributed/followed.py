"""Masks that weights choose for themselves, noted in a run, or followed by another.

Layouts add gradients up in different orders, and plain PyTorch in yet another, so that weights
differ in their last digits. Where two magnitudes at the edge of a mask are as near to each other,
either may be the larger, and no rule chooses alike: what it compares differs. A run that follows
another notes what it would have chosen otherwise, and how near that was to a tie, and takes the
other's masks. What is left of a difference between the two is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from megatron.core import parallel_state as ps
from torch import Tensor

from megatron_spdf.kernels.mask import unpack
from megatron_spdf.layers.masked import MaskedWeight
from megatron_spdf.training.mask_moves import MaskMoves


@dataclass
class Choices:
    """Masks of a run by the number of the choice and the weight.

    Attributes:
        made: (number, canonical name) -> mask bits of its slices, and those of what learns.
        number: of the choice that is due, 0 for the first.
        flips: entries that a run would have chosen otherwise than the one it followed.
        gap: largest difference of two magnitudes of which each chose another; where entries are
            chosen together, of their sums in a slice.
    """

    made: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    number: int = 0
    flips: int = 0
    gap: float = 0.0

    def follow(self, compact: MaskedWeight, values: Tensor) -> None:
        """Puts the noted masks of a rank's slices in place of those it has chosen."""
        first = ps.get_tensor_model_parallel_rank() * len(compact.mask_bits)
        noted = self.made[self.number, compact.planned.name]
        magnitudes = values.detach().float().abs()
        for bits, theirs in zip(_bits_of(compact), noted, strict=False):
            part = theirs[first : first + len(bits)]
            ours, given = (unpack(b, magnitudes.shape[1]) for b in (bits, part))
            self.flips += int((ours & ~given).sum())
            for entries, mine, other in zip(magnitudes, ours & ~given, given & ~ours, strict=True):
                apart = entries[mine].sort().values - entries[other].sort().values
                if compact.planned.pattern.name in ("2:4", "tile"):
                    apart = apart.sum(0, keepdim=True)
                self.gap = max(self.gap, *apart.abs().tolist(), 0.0)
            bits.copy_(part)


@contextmanager
def choices(note: Path | None = None, follow: Path | None = None) -> Iterator[Choices]:
    """Has runs of one process note their choices in a file, or any follow those of one."""
    found, choose = Choices(), MaskedWeight.choose
    begin, count = MaskMoves.__post_init__, MaskMoves._choose
    if follow:
        found.made = torch.load(follow, weights_only=True)

    def chosen(compact: MaskedWeight, values: Tensor) -> None:
        due = compact.due and not values.is_meta
        choose(compact, values)
        if due and note:
            key = found.number, compact.planned.name
            found.made[key] = [bits.clone() for bits in _bits_of(compact)]
        elif due and follow:
            with torch.no_grad():
                found.follow(compact, values)

    def begun(moves: MaskMoves) -> None:
        begin(moves)
        found.number = moves.state.mask_updates

    def counted(moves: MaskMoves, result) -> None:
        count(moves, result)
        found.number = moves.state.mask_updates

    with (patch.object(MaskedWeight, "choose", chosen),
          patch.object(MaskMoves, "__post_init__", begun),
          patch.object(MaskMoves, "_choose", counted)):
        yield found
    if note:
        torch.save(found.made, note)


def _bits_of(compact: MaskedWeight) -> list[Tensor]:
    return [compact.mask_bits, *([compact.trained_bits] if compact.planned.trains_some else [])]
