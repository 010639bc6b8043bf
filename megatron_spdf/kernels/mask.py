"""What the kernels know of a compact weight's mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spdf.kernels.limits import multiplied

SPAN = 1024  # entries of a chunk between two counts of the active ones before
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of Triton's kernels


def multiplies_blocks(size: int, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels multiply with blocks of this size and values of this dtype."""
    return dtype in DTYPES and multiplied(size)


@dataclass(frozen=True)
class Blocks:
    """The active blocks of a mask of b x b blocks, as many in every block row, and in every block column, of a chunk.

    A row of a chunk holds b values of each of its `per_row` active blocks, so that a chunk's values are a dense matrix
    (rows, per_row * b), and a block of it a strided tile: compact storage and storage by blocks are one.

    Attributes:
        size: b.
        per_row: active blocks of a block row in each chunk.
        columns: (out / b, slots) int32: the block column of each active block of a block row, ascending.
        entries: (in / b, blocks in a column) int32: the active blocks of a block column, as block row * slots + slot.
    """

    size: int
    per_row: int
    columns: Tensor
    entries: Tensor

    @property
    def slots(self) -> int:
        """Active blocks of a block row of this rank's weight, over all chunks that it crosses."""
        return self.columns.shape[1]


@dataclass(frozen=True)
class TwoFour:
    """What multiplying by a 2:4 weight on sparse tensor cores needs beside its values.

    Attributes:
        metadata, transposed: where the active entries of the weight (out, in), and of its transpose, are; as a library
            wants it.
        order: (active entries,) int32: the place among the values of each active entry of the transpose, row by row.
    """

    metadata: Tensor
    transposed: Tensor
    order: Tensor


@dataclass(frozen=True)
class Mask:
    """The mask of this rank's chunks of a weight.

    Attributes:
        bits: (chunks, ceil(entries of a chunk / 8)) uint8, a bit an entry in row-major order, numpy.packbits order.
        index: what `kernels.make_index` made of the bits: (n,) positions, or (chunks, spans) counts for Triton.
        shape: (out, in) of this rank's dense weight.
        chunk_shape: (out, in) of a chunk.
        axis: along which the chunks lie beside one another in the weight.
        active: entries set in each chunk.
        blocks: of a mask of blocks, where kernels compute on them.
        two_four: of a 2:4 mask, where sparse tensor cores multiply with it.
    """

    bits: Tensor
    index: Tensor
    shape: tuple[int, int]
    chunk_shape: tuple[int, int]
    axis: int
    active: int
    blocks: Blocks | None = None
    two_four: TwoFour | None = None

    @property
    def chunks(self) -> int:
        return len(self.bits)

    @property
    def entries(self) -> int:
        """Of a chunk."""
        return math.prod(self.chunk_shape)


def positions(bits: Tensor, chunk_shape: tuple[int, int], axis: int) -> Tensor:
    """Row-major positions of the active entries in the dense weight, chunk after chunk: (n,) int64."""
    chunks, (rows, columns) = len(bits), chunk_shape
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    active = (bits.unsqueeze(-1) >> shifts & 1).view(chunks, -1)[:, : rows * columns]
    chunk, entry = active.nonzero(as_tuple=True)
    if axis == 0:
        return chunk * (rows * columns) + entry
    return entry // columns * (columns * chunks) + chunk * columns + entry % columns


def find_blocks(bits: Tensor, chunk_shape: tuple[int, int], axis: int, size: int) -> Blocks:
    """The tables of a mask of blocks, on the device of its bits; it is known to be balanced."""
    places = positions(bits, chunk_shape, axis)
    chunks, (rows, columns) = len(bits), chunk_shape
    shape = (rows * chunks, columns) if axis == 0 else (rows, columns * chunks)
    row, column = places // shape[1], places % shape[1]
    corner = (row % size == 0) & (column % size == 0)
    grid = torch.zeros(shape[0] // size, shape[1] // size, dtype=torch.bool, device=bits.device)
    grid[row[corner] // size, column[corner] // size] = True
    slots = int(grid[0].sum())
    slot = grid.cumsum(1) - 1  # of a block in its row
    by_row = grid.nonzero()[:, 1].view(len(grid), slots)
    place, at = grid.T.nonzero(as_tuple=True)
    entries = (at * slots + slot[at, place]).view(grid.shape[1], -1)
    return Blocks(size, slots if axis == 0 else slots // chunks, by_row.int(), entries.int())
