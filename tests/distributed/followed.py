"""Masks of the largest magnitudes, noted in a run, or followed by another.

Layouts add gradients up in different orders, and plain PyTorch in yet another, so that weights
differ in their last digits. Where two magnitudes at the edge of a mask are as near to each other,
either may be the larger, and no rule chooses alike: what it compares differs. A run that follows
another notes what it would have chosen otherwise, and how near that was to a tie, and takes the
other's masks. What is left of a difference between the two is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from megatron.core import parallel_state as ps
from torch import Tensor

from megatron_spdf.checkpoint.border import _Across
from megatron_spdf.kernels.mask import unpack
from megatron_spdf.layers.masked import MaskedWeight
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.sparsity import moving
from megatron_spdf.sparsity.slices import slice_of
from megatron_spdf.training.mask_moves import MaskMoves


@dataclass
class Choices:
    """Masks of a run by the number of the choice, or the step of the pruning, and the weight.

    Attributes:
        made: (number or step, canonical name) -> mask bits of its slices, and where weights keep
            all entries those of what learns.
        number: of the choice that is due, 0 for the first.
        flips: entries that a run would have chosen otherwise than the one it followed.
        gap: largest difference of two magnitudes of which each chose another; where entries are
            chosen together, of their sums in a slice.
        taken: keys of `made` that a run took.
    """

    made: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    number: int = 0
    flips: int = 0
    gap: float = 0.0
    taken: set[tuple[int, str]] = field(default_factory=set)

    @property
    def followed(self) -> dict:
        """What a run that followed says of it, see above."""
        return {"flips": self.flips, "gap": self.gap, "taken": self.taken}

    def follow(self, compact: MaskedWeight, values: Tensor) -> None:
        """Puts the noted masks of a rank's slices in place of those it has chosen."""
        first = ps.get_tensor_model_parallel_rank() * len(compact.mask_bits)
        noted = self.of(self.number, compact.planned.name)
        magnitudes = values.detach().float().abs()
        for bits, theirs in zip(_bits_of(compact), noted, strict=False):
            part = theirs[first : first + len(bits)]
            ours, given = (unpack(b, magnitudes.shape[1]) for b in (bits, part))
            self.compare(magnitudes, ours, given, compact.planned.pattern.name in ("2:4", "tile"))
            bits.copy_(part)

    def compare(self, magnitudes: Tensor, ours: Tensor, given: Tensor,
                by_sum: bool = False) -> None:
        """Counts what differs between masks (slices, entries) of as many entries."""
        self.flips += int((ours & ~given).sum())
        for entries, mine, other in zip(magnitudes, ours & ~given, given & ~ours, strict=True):
            apart = entries[mine].sort().values - entries[other].sort().values
            if by_sum:
                apart = apart.sum(0, keepdim=True)
            self.gap = max(self.gap, *apart.abs().tolist(), 0.0)

    def of(self, number: int, name: str) -> list[Tensor]:
        """What the other run had, which is taken."""
        self.taken.add((number, name))
        return self.made[number, name]

    def of_step(self, step: int, name: str, entries: int) -> Tensor:
        """Masks (slices, entries) that the other run had after a step at which it pruned."""
        return unpack(self.of(step, name)[0], entries)


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


@contextmanager
def prunings(follow: Path) -> Iterator[Choices]:
    """Has a run that prunes hold and drop the entries that another did."""
    found, keep, mask = Choices(torch.load(follow, weights_only=True)), moving.kept_entries, \
        _Across._mask

    def kept(algorithm, when, planned, seed, first, bits, before, values) -> Tensor:
        ours = keep(algorithm, when, planned, seed, first, bits, before, values)
        stored = unpack(bits, math.prod(planned.slice_shape))
        given = found.of_step(when.step, planned.name, stored.shape[1])[first : first + len(bits)]
        left = torch.stack([there[own] for there, own in zip(given, stored, strict=True)])
        found.compare(values.abs(), ours, left)
        return left

    def masked(across: _Across, name: str, number: int) -> np.ndarray:
        planned = across.plan.weights[name]
        size = math.prod(planned.slice_shape)
        if (name, number) not in across._masks:
            mask(across, name, number)
            dense = across.reader.state(name, MASTER)
            given = found.of_step(across.reader.run["state"]["step"], name, size)
            for each in range(planned.slices):
                ours = unpack(torch.from_numpy(across._masks[name, each])[None], size)
                magnitudes = slice_of(dense, planned, each).abs()
                found.compare(magnitudes[None], ours, given[each, None])
                across._masks[name, each] = np.packbits(given[each].numpy())
        return across._masks[name, number]

    with (patch.object(moving, "kept_entries", kept), patch.object(_Across, "_mask", masked)):
        yield found


def _bits_of(compact: MaskedWeight) -> list[Tensor]:
    return [compact.mask_bits, *([compact.trained_bits] if compact.planned.trains_some else [])]
