"""Masks of the largest magnitudes, of all slices at once, on their device, and values that choose a
given mask."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.kernels.mask import pack

SWEEPS = 3  # of all pairs of rows, after which a trade is rare


def keep_largest(magnitudes: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, ties by position: (rows, entries) bool.

    Args:
        magnitudes: (rows, entries) fp32, not negative.
    """
    threshold = _at_rank(magnitudes, count)
    above, ties = magnitudes > threshold, magnitudes == threshold
    left = count - above.sum(-1, keepdim=True)
    return above | ties & (ties.cumsum(-1, dtype=torch.int32) <= left)


def _at_rank(magnitudes: Tensor, count: int) -> Tensor:
    """The `count`th largest of each row, (rows, 1)."""
    if magnitudes.device.type != "cpu":
        return magnitudes.topk(count, sorted=False).values.amin(-1, keepdim=True)
    place = magnitudes.shape[-1] - count  # NumPy selects several times as fast as PyTorch
    found = np.partition(magnitudes.numpy(), place, axis=-1)[:, place]
    return torch.from_numpy(found).unsqueeze(-1)


def smallest_at_rank(scores: Tensor, count: int, selects_alone: bool) -> Tensor:
    """The `count`th smallest, ().

    Args:
        scores: (n,).
        selects_alone: whether `kthvalue` is fast on the device. A GPU gives it one multiprocessor
            for a row, with which a move of GPT-2 Small took 1.6 s on an H100, and all to `topk`.
    """
    if selects_alone:
        return scores.kthvalue(count).values
    return scores.topk(count, largest=False, sorted=False).values.amax()


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
    return pack(keep_largest(values.detach().float().abs(), count))


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
