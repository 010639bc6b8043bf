"""The largest or lowest entries of each row in Triton, by a radix select: a few passes over the
memory, and no sort.

Entries become whole numbers, keys, of which the largest are wanted. A pass counts, among the keys
that begin as the threshold does, how many have each value of the next digit, which gives that digit
of the threshold. The last pass also keeps the counts of each block of entries, so that ties before
a block are known, and ties go by position. A last kernel packs the bits. Nothing comes to the host,
and all sums are of whole numbers, so that every rank selects the same.

Letters: S rows of E entries. Up to two numbers of entries are selected from the same rows at once,
as RANKS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels.program_shapes import SELECTION

MAGNITUDE_BITS = {torch.bfloat16: 15, torch.float16: 15, torch.float32: 31}
SCORE_BITS = {torch.float32: 32, torch.int64: 64}
AT_ONCE = tl.constexpr(256)  # blocks whose ties are added up together


def fill_largest(values: Tensor, wanted: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Fills packed bits with the largest magnitudes of each row, ties by position; in place.

    Args:
        values: (S, E), of 16 or 32 bits.
        wanted: one or two pairs of a number of entries of each row, over 0, and bits
            (S, ceil(E / 8)) uint8, contiguous.

    Returns:
        The number of entries that became set in the first bits, () int32.
    """
    return _fill(values, MAGNITUDE_BITS[values.dtype], wanted)


def lowest_bits(scores: Tensor, count: int) -> Tensor:
    """The lowest scores of each row, ties by position, packed: (S, ceil(E / 8)) uint8.

    Args:
        scores: (S, E) fp32 or int64.
        count: of each row.
    """
    bits = torch.zeros(len(scores), -(-scores.shape[1] // 8), dtype=torch.uint8,
                       device=scores.device)
    if count:
        _fill(scores, SCORE_BITS[scores.dtype], [(count, bits)])
    return bits


def _fill(x: Tensor, key_bits: int, wanted: Sequence[tuple[int, Tensor]]) -> Tensor:
    (rows, entries), ranks, shape = x.shape, len(wanted), SELECTION[x.element_size()][0]
    (first, bits), (second, others) = wanted[0], wanted[-1]
    assert 0 < first <= entries and 0 < second <= entries, (first, second, entries)
    x, bins = x.contiguous(), 2**shape.digit
    levels, blocks = triton.cdiv(key_bits, shape.digit), triton.cdiv(entries, shape.entries)
    tables = rows * ranks * levels * bins
    # the last is the number of entries that become set
    counts = torch.zeros(tables + 1, dtype=torch.int32, device=x.device)
    of_blocks = torch.empty(rows * ranks * blocks * bins, dtype=torch.int32, device=x.device)
    fixed = {"KEY_BITS": key_bits, "RANKS": ranks, "LEVELS": levels, "DIGIT": shape.digit,
             "BLOCK": shape.entries, "num_warps": shape.warps}
    for level in range(levels):
        _count[(blocks, rows)](x, counts, of_blocks, level, first, second, entries, **fixed)
    _write[(blocks, rows)](x, counts, of_blocks, bits, others, first, second, entries,
                           bits.shape[1], counts[tables:], **fixed)
    return counts[tables]


@triton.jit
def _keys(x, entry, entries, KEY_BITS: tl.constexpr):
    """Keys of entries of this program's row; the larger the key, the more an entry is wanted."""
    x += tl.program_id(1).to(tl.int64) * entries
    value = tl.load(x + entry, mask=entry < entries, other=0)
    if KEY_BITS == 15:  # a magnitude of 16 bits
        key = value.to(tl.uint16, bitcast=True).to(tl.uint32) & 0x7FFF
    elif KEY_BITS == 31:
        key = value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    elif KEY_BITS == 32:  # the lowest of floats: bits of negative ones ascend as these descend
        word = value.to(tl.uint32, bitcast=True)
        word = tl.where(word << 1 == 0, 0, word)  # -0.0 is 0.0
        key = tl.where(word >> 31 != 0, word, word ^ 0x7FFFFFFF)
    else:  # the lowest of int64
        key = value.to(tl.uint64, bitcast=True) ^ 0x7FFFFFFFFFFFFFFF
    return key


@triton.jit
def _threshold(counts, wanted, rank, levels, KEY: tl.constexpr, RANKS: tl.constexpr,
               LEVELS: tl.constexpr, DIGIT: tl.constexpr):
    """The first digits of the threshold of this program's row, and how many of the entries that
    begin like it are wanted."""
    BINS: tl.constexpr = 1 << DIGIT
    counts += tl.program_id(1) * RANKS * LEVELS * BINS
    digit, threshold, left = tl.arange(0, BINS), tl.cast(0, KEY), wanted
    for level in range(levels):
        # all ranks have the counts of the first digit in common
        table = counts + (tl.where(level > 0, rank, 0) * LEVELS + level) * BINS
        count = tl.load(table + digit)
        above = tl.sum(count, 0) - tl.cumsum(count, 0)
        found = (above < left) & (left <= above + count)
        left -= tl.sum(tl.where(found, above, 0), 0)
        threshold = (threshold << DIGIT) | tl.sum(tl.where(found, digit, 0), 0).to(KEY)
    return threshold, left


@triton.jit(do_not_specialize=["level", "first", "second"])
def _count(x, counts, of_blocks, level, first, second, entries, KEY_BITS: tl.constexpr,
           RANKS: tl.constexpr, LEVELS: tl.constexpr, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Counts a digit of a block's entries that begin like the threshold."""
    KEY: tl.constexpr = tl.uint64 if KEY_BITS == 64 else tl.uint32
    BINS: tl.constexpr = 1 << DIGIT
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key, digit = _keys(x, entry, entries, KEY_BITS), tl.arange(0, BINS)
    shift = (DIGIT * (LEVELS - 1 - level)).to(KEY)
    for rank in tl.static_range(RANKS):
        if (rank == 0) | (level > 0):
            threshold, _ = _threshold(counts, first if rank == 0 else second, rank, level, KEY,
                                      RANKS, LEVELS, DIGIT)
            alike = (entry < entries) & (key >> shift >> DIGIT == threshold)
            count = tl.histogram((key >> shift & BINS - 1).to(tl.int32), BINS, mask=alike)
            table = (tl.program_id(1) * RANKS + rank) * LEVELS + level
            tl.atomic_add(counts + table * BINS + digit, count, mask=count > 0, sem="relaxed")
            if level == LEVELS - 1:
                block = (tl.program_id(1) * RANKS + rank) * tl.num_programs(0) + tl.program_id(0)
                tl.store(of_blocks + block * BINS + digit, count)


@triton.jit(do_not_specialize=["first", "second"])
def _write(x, counts, of_blocks, bits, others, first, second, entries, row_bytes, born,
           KEY_BITS: tl.constexpr, RANKS: tl.constexpr, LEVELS: tl.constexpr,
           DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Packs a block of the selected entries, and counts those that become set in the first bits."""
    KEY: tl.constexpr = tl.uint64 if KEY_BITS == 64 else tl.uint32
    BINS: tl.constexpr = 1 << DIGIT
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, key = entry < entries, _keys(x, entry, entries, KEY_BITS)
    byte = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    place = tl.program_id(1).to(tl.int64) * row_bytes + byte
    shifts = 7 - tl.arange(0, 8)[None, :]  # the first entry of a byte is its highest bit
    for rank in tl.static_range(RANKS):
        threshold, left = _threshold(counts, first if rank == 0 else second, rank, LEVELS, KEY,
                                     RANKS, LEVELS, DIGIT)
        table = (tl.program_id(1) * RANKS + rank) * tl.num_programs(0)
        before, last = tl.zeros((AT_ONCE,), tl.int32), (threshold & BINS - 1).to(tl.int32)
        for start in range(0, tl.program_id(0), AT_ONCE):
            block = start + tl.arange(0, AT_ONCE)
            before += tl.load(of_blocks + (table + block) * BINS + last,
                              mask=block < tl.program_id(0), other=0)
        ties = there & (key == threshold)
        number = tl.sum(before, 0) + tl.cumsum(ties.to(tl.int32), 0)
        selected = there & (key > threshold) | ties & (number <= left)
        unpacked = tl.reshape(selected.to(tl.int32), (BLOCK // 8, 8))
        packed = tl.sum(unpacked << shifts, 1)
        if rank == 0:
            old = tl.load(bits + place, mask=byte < row_bytes, other=255).to(tl.int32)
            new = unpacked & ~(old[:, None] >> shifts)
            tl.atomic_add(born, tl.sum(tl.sum(new, 1), 0), sem="relaxed")
            tl.store(bits + place, packed.to(tl.uint8), mask=byte < row_bytes)
        else:
            tl.store(others + place, packed.to(tl.uint8), mask=byte < row_bytes)
