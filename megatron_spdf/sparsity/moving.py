"""Moving the masks of a weight: an algorithm chooses slice by slice, values follow to their places.

Letters: n entries of a slice, k of them active. An algorithm chooses among its units, which are
entries or tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.mask import Mask, ones, pack, unpack
from megatron_spdf.sparsity.algorithms.base import MaskAlgorithm, Moment
from megatron_spdf.sparsity.largest import keep_lowest
from megatron_spdf.sparsity.mask_slice import MaskSlice, MaskSlices
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.units import Units


def moved_masks(
    algorithm: MaskAlgorithm, when: Moment, planned: SparseWeight, seed: int, first: int,
    bits: Tensor, values: Tensor, gradient: Tensor | None
) -> Tensor:
    """Lets an algorithm choose the next masks of a weight's slices on one rank.

    Args:
        seed: of the masks.
        first: number of the rank's first slice.
        bits: (slices, ceil(n / 8)) uint8, the masks as they are.
        values: (slices, k) fp32, the master weights.
        gradient: (out, in) of the rank's part of the dense weight, if the algorithm needs it.

    Returns:
        (slices, ceil(n / 8)) uint8, with k active entries a slice.
    """
    rows, columns = planned.slice_shape
    size, units, parts = planned.slice_shape[planned.axis], Units.of(planned), []
    masks = unpack(bits, rows * columns)
    if gradient is not None:  # (slices, n); a copy where columns are cut, of all at once
        gradient = gradient.unflatten(planned.axis, (len(bits), size)).movedim(
            planned.axis, 0).reshape(len(bits), -1)
    for i, mask in enumerate(masks):
        parts.append(MaskSlice(
            planned.name, first + i, units.of_mask(mask),
            units.magnitudes(values[i], mask) if algorithm.needs != "nothing" else None,
            None if gradient is None else units.norms(gradient[i]),
            seed, when.update, pattern=planned.pattern, grid=units.grid,
            units=values.shape[1] // math.prod(units.size)))
    if algorithm.together and not planned.pattern.exchanges:
        return pack(_exchanged(algorithm, parts, when, masks, values))
    return pack(torch.stack([units.to_mask(_next_mask(algorithm, part, when)) for part in parts]))


def _exchanged(algorithm: MaskAlgorithm, parts: Sequence[MaskSlice], when: Moment, masks: Tensor,
               values: Tensor) -> Tensor:
    """The next masks where the smallest magnitudes die, of all slices at once: (slices, n) bool."""
    count = algorithm.count(values.shape[1], when)
    dies = keep_lowest(values.abs(), count)
    born = keep_lowest(algorithm.to_be_born(MaskSlices(parts)), count)
    after = torch.zeros_like(masks).masked_scatter_(masks, ~dies)
    return after.masked_scatter_(~masks, born)


def _next_mask(algorithm: MaskAlgorithm, part: MaskSlice, when: Moment) -> Tensor:
    """(n,) bool."""
    move, mask = algorithm.select(part, when), part.mask.clone()
    mask[move.died] = False
    mask[move.born] = True
    told = f"{algorithm.name} moves slice {part.number} of {part.name}"
    assert part.mask[move.died].all() and not part.mask[move.born].any(), \
        f"{told}: what dies must be active, and what is born inactive"
    active, k = int(mask.sum()), len(part.active)
    assert active == k, f"{told}: {k} active units become {active}"
    return mask


def kept_entries(algorithm: MaskAlgorithm, when: Moment, planned: SparseWeight, seed: int,
                 first: int, bits: Tensor, kept: Tensor | None, values: Tensor) -> Tensor:
    """Lets an algorithm choose which active entries are held at zero from now on.

    Args:
        bits, values, seed, first: see `moved_masks`.
        kept: (slices, k) bool, those that are not held yet; None: all.

    Returns:
        (slices, k) bool, those that are not held.
    """
    if algorithm.together:
        stay = min(algorithm.left(planned.active_at, when), values.shape[1])
        # those that are held are the lowest of all, which need not be counted then
        scores = values.abs() if kept is None else torch.where(kept, values.abs(), -1.0)
        died = keep_lowest(scores, values.shape[1] - stay)
        return ~died if kept is None else kept & ~died
    masks, left = unpack(bits, planned.numel // planned.slices), []
    for i, mask in enumerate(masks):
        alive, here = mask.clone(), torch.ones_like(values[i], dtype=torch.bool)
        if kept is not None:
            alive[mask], here = kept[i], kept[i]
        part = MaskSlice(planned.name, first + i, alive, values[i][here], None, seed, when.update,
                         planned.active_at)
        move = algorithm.select(part, when)
        assert alive[move.died].all() and not len(move.born), (algorithm.name, planned.name)
        alive[move.died] = False
        left.append(alive[mask])
    return torch.stack(left)


class Carrier:
    """Carries states of a weight from one mask to another; what is born is zero.

    Values lie in the order of the active entries, so that one that dies and one that is born shift
    all between them. Both masks are indexed once, for all states.

    Args:
        before, after: (slices, ceil(n / 8)) uint8, with k active entries in every slice.
        entries: n.
        active: k.
    """

    def __init__(self, before: Tensor, after: Tensor, entries: int, active: int) -> None:
        self._before, self._after = (_as_rows(b, entries, active) for b in (before, after))

    def __call__(self, values: Tensor) -> Tensor:
        """(slices, k) of the mask after, from those of the mask before."""
        return dispatch.compress(dispatch.expand(values, self._before), self._after)


def _as_rows(bits: Tensor, entries: int, active: int) -> Mask:
    """The mask of a weight whose rows are the slices."""
    place = (1, entries), 0
    return Mask(bits, dispatch.make_index(bits, *place), (len(bits), entries), *place, active)


def born(before: Tensor, after: Tensor) -> Tensor:
    """The number of entries that are active after a move and were not before it, ()."""
    return ones(after & ~before).sum()
