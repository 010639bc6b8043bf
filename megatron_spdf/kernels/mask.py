"""What the kernels know of a compact weight's mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spdf.kernels.limits import multiplied

SPAN = 1024  # entries of a slice between two counts of the active ones before
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of Triton's kernels


def multiplies_tiles(size: int, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels multiply with tiles of this size and values of this dtype."""
    return dtype in DTYPES and multiplied(size)


@dataclass(frozen=True)
class TileTable:
    """The active tiles of a mask of b x b tiles, as many in every tile row, and in every tile
    column, of a slice.

    A row of a slice holds b values of each of its `per_row` active tiles, so that a slice's values
    are a dense matrix (rows, per_row * b), and a tile of it a strided tile: compact storage and
    storage by tiles are one.

    Attributes:
        size: b.
        per_row: active tiles of a tile row in each slice.
        columns: (out / b, slots) int32: the tile column of each active tile of a tile row,
            ascending.
        entries: (in / b, tiles in a column) int32: the active tiles of a tile column, as tile row *
            slots + slot.
    """

    size: int
    per_row: int
    columns: Tensor
    entries: Tensor

    @property
    def slots(self) -> int:
        """Active tiles of a tile row of this rank's weight, over all slices that it crosses."""
        return self.columns.shape[1]


@dataclass(frozen=True)
class TwoFour:
    """What multiplying by a 2:4 weight on sparse tensor cores needs beside its values.

    Attributes:
        metadata, transposed: where the active entries of the weight (out, in), and of its
            transpose, are; as a library wants it.
        order: (active entries,) int32: the place among the values of each active entry of the
            transpose, row by row.
    """

    metadata: Tensor
    transposed: Tensor
    order: Tensor


@dataclass(frozen=True)
class Mask:
    """The mask of this rank's slices of a weight.

    Attributes:
        bits: (slices, ceil(entries of a slice / 8)) uint8, a bit an entry in row-major order,
            numpy.packbits order.
        index: what `kernels.make_index` made of the bits: (n,) positions, or (slices, spans) counts
            for Triton.
        shape: (out, in) of this rank's dense weight.
        slice_shape: (out, in) of a slice.
        axis: along which the slices lie beside one another in the weight.
        active: entries set in each slice.
        tiles: of a mask of tiles, where kernels compute on them.
        two_four: of a 2:4 mask, where sparse tensor cores multiply with it.
    """

    bits: Tensor
    index: Tensor
    shape: tuple[int, int]
    slice_shape: tuple[int, int]
    axis: int
    active: int
    tiles: TileTable | None = None
    two_four: TwoFour | None = None

    @property
    def slices(self) -> int:
        return len(self.bits)

    @property
    def entries(self) -> int:
        """Of a slice."""
        return math.prod(self.slice_shape)


def unpack(bits: Tensor, entries: int) -> Tensor:
    """The entries of slices, (slices, entries) bool, from their packed bits."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> shifts & 1).view(len(bits), -1)[:, :entries].bool()


def pack(masks: Tensor) -> Tensor:
    """`unpack` undone: (slices, ceil(entries / 8)) uint8, numpy.packbits order."""
    slices, entries = masks.shape
    padded = masks.new_zeros(slices, -(-entries // 8), 8, dtype=torch.uint8)
    padded.view(slices, -1)[:, :entries] = masks
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def positions(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """Row-major positions of the active entries in the dense weight, slice after slice: (n,)
    int64."""
    slices, (rows, columns) = len(bits), slice_shape
    active = unpack(bits, rows * columns)
    slice_id, entry = active.nonzero(as_tuple=True)
    if axis == 0:
        return slice_id * (rows * columns) + entry
    return entry // columns * (columns * slices) + slice_id * columns + entry % columns


def find_tiles(bits: Tensor, slice_shape: tuple[int, int], axis: int, size: int) -> TileTable:
    """The tables of a mask of tiles, on the device of its bits; it is known to be balanced."""
    places = positions(bits, slice_shape, axis)
    slices, (rows, columns) = len(bits), slice_shape
    shape = (rows * slices, columns) if axis == 0 else (rows, columns * slices)
    row, column = places // shape[1], places % shape[1]
    corner = (row % size == 0) & (column % size == 0)
    grid = torch.zeros(shape[0] // size, shape[1] // size, dtype=torch.bool, device=bits.device)
    grid[row[corner] // size, column[corner] // size] = True
    slots = int(grid[0].sum())
    slot = grid.cumsum(1) - 1  # of a tile in its row
    by_row = grid.nonzero()[:, 1].view(len(grid), slots)
    place, at = grid.T.nonzero(as_tuple=True)
    entries = (at * slots + slot[at, place]).view(grid.shape[1], -1)
    return TileTable(size, slots if axis == 0 else slots // slices, by_row.int(), entries.int())
