"""Masks of the largest magnitudes, of all slices at once, on their device, and values that choose a
given mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.kernels.mask import ones, pack, unpack
from megatron_spdf.kernels.selection import largest_kernels, lowest_kernels

SWEEPS = 3  # of all pairs of rows, after which a trade is rare


def keep_largest(magnitudes: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, ties by position: (rows, entries) bool.

    Args:
        magnitudes: (rows, entries) fp32, not negative.
        count: over 0.
    """
    threshold = _at_rank(magnitudes, count, largest=True)
    return _up_to(magnitudes > threshold, magnitudes == threshold, count)


def keep_lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row, ties by position: (rows, entries) bool.

    Args:
        scores: (rows, entries) fp32 or int64.
    """
    if kernels := lowest_kernels(scores):
        return unpack(kernels.lowest_bits(scores, count), scores.shape[1])
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _at_rank(scores, count, largest=False)
    return _up_to(scores < threshold, scores == threshold, count)


def _up_to(within: Tensor, ties: Tensor, count: int) -> Tensor:
    """Entries of rows, and as many of the ties as `count` leaves."""
    left = count - within.sum(-1, keepdim=True)
    return within | ties & (ties.cumsum(-1, dtype=torch.int32) <= left)


def _at_rank(scores: Tensor, count: int, largest: bool) -> Tensor:
    """The `count`th largest, or lowest, of each row, (rows, 1)."""
    if scores.device.type != "cpu":
        return smallest_at_rank(scores, count, False, largest).unsqueeze(-1)
    if scores.dtype in (torch.bfloat16, torch.float16):
        return _at_rank(scores.float(), count, largest).to(scores.dtype)
    # NumPy selects several times as fast as PyTorch
    place = scores.shape[-1] - count if largest else count - 1
    found = np.partition(scores.numpy(), place, axis=-1)[:, place]
    return torch.from_numpy(found).unsqueeze(-1)


def smallest_at_rank(scores: Tensor, count: int, selects_alone: bool,
                     largest: bool = False) -> Tensor:
    """The `count`th smallest of the last axis, or largest.

    Args:
        scores: (..., n).
        selects_alone: whether `kthvalue` is fast on the device. A GPU gives it one multiprocessor
            for a row, with which a move of GPT-2 Small took 1.6 s on an H100, and all to `topk`.
    """
    if selects_alone and not largest:
        return scores.kthvalue(count).values
    found = scores.topk(count, largest=largest, sorted=False).values
    return found.amin(-1) if largest else found.amax(-1)


def fill_largest(values: Tensor, wanted: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Fills packed bits with the largest magnitudes of each slice, ties by position; in place.

    Args:
        values: (slices, entries), of any floating point type.
        wanted: one or two pairs of a number of entries of each slice, and bits (slices, bytes)
            uint8.

    Returns:
        The number of entries that became active in the first bits, ().
    """
    if kernels := largest_kernels(values):
        return kernels.fill_largest(values, wanted)
    magnitudes = values.float().abs()
    new = [pack(keep_largest(magnitudes, count)) for count, _ in wanted]
    born = ones(new[0] & ~wanted[0][1]).sum()
    for (_, bits), found in zip(wanted, new, strict=True):
        bits.copy_(found)
    return born


def keep_largest_of_few(magnitudes: Tensor, count: int) -> Tensor:
    """As `keep_largest`, where rows are many and short.

    Args:
        magnitudes: (rows, entries), not negative.
    """
    order = magnitudes.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    return mask.scatter_(-1, order[:, :count], torch.ones_like(mask))


def largest_bits(values: Tensor, count: int) -> Tensor:
    """The `count` largest magnitudes of each slice, packed: (slices, bytes) uint8.

    Args:
        values: (slices, entries).
    """
    bits = torch.zeros(len(values), -(-values.shape[1] // 8), dtype=torch.uint8,
                       device=values.device)
    fill_largest(values.detach(), [(count, bits)])
    return bits


def under_the_active(entries: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Entries of a slice whose largest magnitudes are those of a mask: the others are scaled down,
    all alike, to half the smallest active one at most, so that bf16 tells them apart.

    Args:
        entries: (entries,) fp32.
        mask: (entries,) bool.
    """
    least, most = np.abs(entries[mask]).min(), np.abs(entries[~mask]).max(initial=0.0)
    scale = min(1.0, 0.5 * float(least) / float(most)) if most else 1.0
    return np.where(mask, entries, np.float32(scale) * entries)


def keep_largest_balanced(scores: Tensor, per_row: int) -> Tensor:
    """Masks with as many active entries in every row, and as many in every column, and scores that
    add up to much: (slices, R, C) bool.

    From consecutive entries on, two rows at a time share out anew the columns that one of them has,
    in the best way for these two (trades as in Strona et al. 2014); every pair of rows for
    `SWEEPS` times. All slices and half as many pairs as there are rows go at once.

    Args:
        scores: (slices, R, C), not negative.
        per_row: active entries of a row; R times that is a multiple of C.
    """
    _, rows, columns = scores.shape
    row, step = torch.arange(rows).view(-1, 1), torch.arange(per_row)
    start = torch.zeros(rows, columns, dtype=torch.bool)
    start[row, (row * per_row + step) % columns] = True
    masks = start.to(scores.device).expand_as(scores).clone()
    for _ in range(SWEEPS):
        for one, other in _pairs(rows):
            _share_out(masks, scores, one, other)
    return masks


def _pairs(rows: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rounds in which every row meets another, as those of a tournament: all pairs once."""
    places = list(range(rows + rows % 2))  # an odd one has no partner for a round
    for _ in range(len(places) - 1):
        half = len(places) // 2
        met = [(a, b) for a, b in zip(places[:half], places[:half - 1:-1], strict=True)
               if max(a, b) < rows]
        if met:
            yield [a for a, _ in met], [b for _, b in met]
        places.insert(1, places.pop())


def _share_out(masks: Tensor, scores: Tensor, one: list[int], other: list[int]) -> None:
    """Lets pairs of rows share out the columns that only one of the two has; in place."""
    mine, theirs = masks[:, one], masks[:, other]
    free = mine ^ theirs
    gain = (scores[:, one] - scores[:, other]).masked_fill(~free, -torch.inf)
    order = gain.argsort(dim=-1, descending=True, stable=True)
    count = (mine & free).sum(-1, keepdim=True)
    first = torch.arange(masks.shape[-1], device=masks.device) < count
    taken = torch.zeros_like(mine).scatter_(-1, order, first.expand_as(mine))
    both = mine & theirs
    masks[:, one], masks[:, other] = both | taken, both | free & ~taken
