"""Moving the masks of a weight: an algorithm chooses slice by slice, values follow to their places.

Letters: n entries of a slice, k of them active. An algorithm chooses among its units, which are
entries or tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spdf.kernels.mask import pack, unpack
from megatron_spdf.sparsity.algorithms.base import MaskAlgorithm, Moment
from megatron_spdf.sparsity.mask_slice import MaskSlice
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
    size, units, masks = planned.slice_shape[planned.axis], Units.of(planned), []
    for i, mask in enumerate(unpack(bits, rows * columns)):
        part = MaskSlice(
            planned.name, first + i, units.of_mask(mask),
            units.magnitudes(values[i], mask) if algorithm.needs != "nothing" else None,
            None if gradient is None else units.norms(
                gradient.narrow(planned.axis, i * size, size).reshape(-1)),
            seed, when.update, pattern=planned.pattern, grid=units.grid)
        masks.append(units.to_mask(_next_mask(algorithm, part, when)))
    return pack(torch.stack(masks))


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


def carry(values: Tensor, before: Tensor, after: Tensor, entries: int) -> Tensor:
    """Carries a state of a weight, (slices, k), from one mask to another; the born are zero.

    Values lie in the order of the active entries, so that one that dies and one that is born shift
    all between them.

    Args:
        before, after: (slices, ceil(n / 8)) uint8, with k active entries in every slice.
        entries: n.
    """
    old, new = unpack(before, entries), unpack(after, entries)
    carried = torch.zeros_like(values)
    carried.view(-1)[old[new]] = values.reshape(-1)[new[old]]
    return carried


def born(before: Tensor, after: Tensor) -> int:
    """The number of entries that are active after a move and were not before it."""
    return int(unpack(after & ~before, 8 * before.shape[1]).sum())
