"""Moving the masks of a weight: an algorithm chooses slice by slice, values follow to their places.

Letters: n entries of a slice, k of them active.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spdf.kernels.mask import pack, unpack
from megatron_spdf.sparsity.algorithms.base import MaskAlgorithm, Moment
from megatron_spdf.sparsity.mask_slice import MaskSlice
from megatron_spdf.sparsity.plan import SparseWeight


@dataclass(frozen=True)
class MovedWeight:
    """The masks of a weight's slices after a move.

    Attributes:
        bits: (slices, ceil(n / 8)) uint8.
        source: (slices, k) int64, the place among the old values of every new one; -1: it is born.
    """

    bits: Tensor
    source: Tensor

    @property
    def born(self) -> int:
        """Number of entries that were born."""
        return int((self.source < 0).sum())

    def carry(self, values: Tensor) -> Tensor:
        """Carries a state of the weight, (slices, k), to its new places; the born are zero."""
        return values.gather(1, self.source.clamp(min=0)).masked_fill_(self.source < 0, 0.0)


def move_weight(
    algorithm: MaskAlgorithm, when: Moment, planned: SparseWeight, seed: int, first: int,
    bits: Tensor, values: Tensor, gradient: Tensor | None
) -> MovedWeight | None:
    """Moves the masks of a weight's slices on one rank; None where no entry moves.

    Args:
        seed: of the masks.
        first: number of the rank's first slice.
        bits: (slices, ceil(n / 8)) uint8, the masks.
        values: (slices, k) fp32, the master weights.
        gradient: (out, in) of the rank's part of the dense weight, if the algorithm needs it.
    """
    rows, columns = planned.slice_shape
    masks, moved, sources = unpack(bits, rows * columns), [], []
    size = planned.slice_shape[planned.axis]
    for i, mask in enumerate(masks):
        part = MaskSlice(
            planned.name, first + i, mask,
            values[i] if algorithm.needs != "nothing" else None,
            None if gradient is None else gradient.narrow(planned.axis, i * size, size).reshape(-1),
            seed, when.update)
        after, source = _moved(algorithm, part, when)
        moved.append(after)
        sources.append(source)
    source = torch.stack(sources)
    return MovedWeight(pack(torch.stack(moved)), source) if (source < 0).any() else None


def _moved(algorithm: MaskAlgorithm, part: MaskSlice, when: Moment) -> tuple[Tensor, Tensor]:
    """The mask of a slice after a move, (n,) bool, and the sources of its values, (k,)."""
    move, after = algorithm.select(part, when), part.mask.clone()
    after[move.died] = False
    after[move.born] = True
    active = after.nonzero().view(-1)
    told = f"{algorithm.name} moves slice {part.number} of {part.name}"
    assert part.mask[move.died].all() and not part.mask[move.born].any(), \
        f"{told}: what dies must be active, and what is born inactive"
    assert len(active) == len(part.active), \
        f"{told}: {len(part.active)} active entries become {len(active)}"
    place = part.mask.cumsum(0) - 1  # of an active entry among the values
    return after, torch.where(part.mask[active], place[active], -1)
