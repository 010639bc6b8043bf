"""Products with weights of tiles: where the tiles of a mask lie, and what multiplies with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_spdf.kernels import dispatch, torch_reference
from megatron_spdf.kernels.dispatch import DENSE
from megatron_spdf.kernels.limits import LARGEST, SMALLEST, multiplied
from megatron_spdf.kernels.mask import DTYPES, Mask, positions
from megatron_spdf.text import first_line


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


@cache
def tile_products(device: str, size: int, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """What multiplies with weights of tiles without expanding them, None where nothing does; and
    its name, or why.

    Args:
        device: as of `implementation`.
        size: of a tile.
    """
    chosen, name = dispatch.implementation(device)
    if chosen is torch_reference:
        return None, DENSE
    if not multiplies_tiles(size, dtype):
        return None, (f"{DENSE}, since the kernels take tiles of {SMALLEST} to {LARGEST} in powers "
                      f"of two, of 16 or 32 bits, not {size} of {dtype}")
    try:
        from megatron_spdf.kernels import triton_tiles

        _self_test(triton_tiles, chosen, torch.device(device), size, dtype)
        return triton_tiles, name
    except Exception as error:  # whatever a compiler, a driver or a GPU it does not know may raise
        return (
            None,
            f"{DENSE}, since triton's products do not work here ({type(error).__name__}: "
            f"{first_line(error)})",
        )


def _self_test(module: ModuleType, moves: ModuleType, device: torch.device, size: int,
                     dtype: torch.dtype) -> None:
    """Raises where products with tiles are not those with the expanded weight. Small whole numbers,
    so that both are exact in any order of the sums.

    Args:
        moves: what expands and compresses on the device.
    """
    shape = 2 * size, 2 * size
    active = (
        torch.eye(2, dtype=torch.uint8)
        .fliplr()
        .repeat_interleave(size, 0)
        .repeat_interleave(size // 8, 1)
        * 255
    )
    bits = active.view(1, -1).to(device)
    mask = Mask(bits, moves.make_index(bits, shape, 0), shape, shape, 0, 2 * size * size,
                find_tiles(bits, shape, 0, size))
    draw = torch.Generator().manual_seed(0)
    x, gradient = torch.randint(-1, 2, (2, 24, 2 * size), generator=draw).to(device, dtype)
    values = torch.randint(1, 3, (1, mask.active), generator=draw).to(device, dtype)
    dense = moves.expand(values, mask)
    buffer = torch.ones(values.shape, device=device)
    wanted = 1 + moves.compress((gradient.T @ x).float(), mask)
    if not (torch.equal(module.forward(x, values, mask), x @ dense.T)
            and torch.equal(module.input_gradient(gradient, values, mask), gradient @ dense)
            and torch.equal(module.weight_gradient(gradient, x, mask, buffer), wanted)):
        raise RuntimeError("they are something else than those with the expanded weight")
