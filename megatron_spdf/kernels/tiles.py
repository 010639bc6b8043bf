"""Products with weights of b x b tiles: the table of a mask's tiles, and the choice of kernels.

Shapes: S slices, E entries and A active entries of a slice; W (out, in) is the dense weight of this
rank; N tokens. A tile row is b rows of the weight, a tile column b columns. A slot numbers the
active tiles of a tile row from left to right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_spdf.kernels import dispatch, torch_reference
from megatron_spdf.kernels.dispatch import DENSE
from megatron_spdf.kernels.limits import LARGEST, SMALLEST, has_tile_kernel
from megatron_spdf.kernels.mask import DTYPES, Mask, positions
from megatron_spdf.text import first_line


def supports_tiles(size: int, dtype: torch.dtype) -> bool:
    """True if Triton's kernels multiply with tiles of this size and values of this dtype."""
    return dtype in DTYPES and has_tile_kernel(size)


@dataclass(frozen=True)
class TileTable:
    """Places of the active tiles of a mask, with as many in every tile row, and in every tile
    column, of a slice.

    A row of a slice holds b values of each of its `per_row` active tiles. So the values of a slice
    are a dense matrix (rows, per_row * b), in which a tile is a strided square: compact storage is
    storage by tiles.

    Attributes:
        size: b.
        per_row: active tiles of a tile row in each slice.
        columns: (out / b, slots) int32, tile column of each active tile of a tile row, ascending.
        entries: (in / b, tiles in a column) int32, active tiles of a tile column, each as tile row
            * slots + slot.
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
    """Table of a balanced mask of tiles, on the device of its bits.

    Args:
        bits: (S, ceil(E / 8)) uint8.
        slice_shape: (out, in) of a slice.
        axis: along which the slices lie beside one another.
        size: b.
    """
    places = positions(bits, slice_shape, axis)
    slices, (rows, columns) = len(bits), slice_shape
    shape = (rows * slices, columns) if axis == 0 else (rows, columns * slices)
    row, column = places // shape[1], places % shape[1]
    # A tile is active as a whole, so its first entry stands for it.
    corner = (row % size == 0) & (column % size == 0)
    grid = torch.zeros(shape[0] // size, shape[1] // size, dtype=torch.bool, device=bits.device)
    grid[row[corner] // size, column[corner] // size] = True  # (out / b, in / b), active tiles
    slots = int(grid[0].sum())
    slot = grid.cumsum(1) - 1  # of an active tile in its tile row
    by_row = grid.nonzero()[:, 1].view(len(grid), slots)
    tile_column, tile_row = grid.T.nonzero(as_tuple=True)
    entries = (tile_row * slots + slot[tile_row, tile_column]).view(grid.shape[1], -1)
    return TileTable(size, slots if axis == 0 else slots // slices, by_row.int(), entries.int())


@cache
def tile_products(device: str, size: int, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """Module that multiplies with weights of tiles without expanding them, and its name for the
    log.

    Args:
        device: cpu or cuda.
        size: b.
        dtype: of the values.

    Returns:
        (module, name); without such a module (None, reason).
    """
    backend, name = dispatch.backend_for(device)
    if backend is torch_reference:
        return None, DENSE
    if not supports_tiles(size, dtype):
        return None, (f"{DENSE}, since the kernels take tiles of {SMALLEST} to {LARGEST} in powers "
                      f"of two, of 16 or 32 bits, not {size} of {dtype}")
    try:
        from megatron_spdf.kernels import triton_tiles

        _self_test(triton_tiles, backend, torch.device(device), size, dtype)
        return triton_tiles, name
    # A compiler, a driver or a new GPU may raise anything.
    except Exception as error:
        return None, (f"{DENSE}, since triton's products do not work here "
                      f"({type(error).__name__}: {first_line(error)})")


def _self_test(module: ModuleType, backend: ModuleType, device: torch.device, size: int,
               dtype: torch.dtype) -> None:
    """Raises if products with tiles differ from products with the expanded weight.

    Operands are small whole numbers, so that both are exact in any order of the sums.

    Args:
        module: with the products.
        backend: expands and compresses on the device.
        device: of the tensors.
        size: b.
        dtype: of values and operands.
    """
    shape = 2 * size, 2 * size
    # One slice of 2 x 2 tiles, whose two tiles off the diagonal are active: (2b, 2b / 8) bytes.
    tiles = torch.eye(2, dtype=torch.uint8).fliplr()
    bytes_ = 255 * tiles.repeat_interleave(size, 0).repeat_interleave(size // 8, 1)
    bits = bytes_.view(1, -1).to(device)
    mask = Mask(bits, backend.make_index(bits, shape, 0), shape, shape, 0, 2 * size * size,
                find_tiles(bits, shape, 0, size))
    draw = torch.Generator().manual_seed(0)
    x, gradient = torch.randint(-1, 2, (2, 24, 2 * size), generator=draw).to(device, dtype)
    values = torch.randint(1, 3, (1, mask.active), generator=draw).to(device, dtype)
    dense = backend.expand(values, mask)
    bias = torch.arange(mask.shape[0], device=device).to(dtype) % 3
    buffer = torch.ones(values.shape, device=device)
    wanted = 1 + backend.compress((gradient.T @ x).float(), mask)
    if not (torch.equal(module.forward(x, values, mask), x @ dense.T)
            and torch.equal(module.forward(x, values, mask, None, bias), x @ dense.T + bias)
            and torch.equal(module.input_gradient(gradient, values, mask), gradient @ dense)
            and torch.equal(module.weight_gradient(gradient, x, mask, buffer), wanted)):
        raise RuntimeError("they are something else than those with the expanded weight")
