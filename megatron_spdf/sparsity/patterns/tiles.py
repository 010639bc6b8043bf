"""Balanced masks of tiles: a slice is a grid of b x b tiles, active or zero as a whole, with the
same number of active tiles in every tile row and the same in every tile column.

So every program of a kernel has equal work, and the compact values of a slice are a dense matrix
(`kernels.mask`). With R x C tiles and n active ones in a tile row there are n R / C in a tile
column, a whole number where n is a multiple of C / gcd(R, C): balanced densities are the multiples
of 1 / gcd(R, C).

Tiles move by swaps of two, which keep these numbers: no published method that moves masks balances
them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Philox
from pydantic import Field

from megatron_spdf.kernels.limits import has_tile_kernel
from megatron_spdf.random_streams import stream_key
from megatron_spdf.section import MOST_WIDTH
from megatron_spdf.sparsity.patterns.base import PATTERNS, Pattern, Shape

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

STREAM = "megatron_spdf block stream 1"
ROUNDS = 32  # of trades; after few of them nothing is left of the first pattern
CLOSE, FAR = 0.01, 0.05  # of a level: rounded to without cutting into fewer slices; refused


class Tiles(Pattern):
    """Square tiles, active or zero as a whole, balanced in each slice."""

    name = "tile"
    remedy = "smaller tiles, or a level that is a coarser fraction"

    tile: int = Field(
        64, gt=0, le=MOST_WIDTH,
        description="side of a tile; levels are rounded to equally many tiles in every row and "
                    "column")

    @property
    def moving_unit(self) -> Shape:
        return self.tile, self.tile

    def cut(self, name: str, shape: Shape, axis: int, most: int, level: float) -> int:
        return tile_slices(name, shape, axis, most, level, self.tile)

    def active(self, shape: Shape, level: float) -> int:
        active, parts = balanced_parts(self.grid(shape), level)
        return shape[0] * shape[1] // parts * active

    def rounded(self, shape: Shape, level: float) -> float:
        active, parts = balanced_parts(self.grid(shape), level)
        return 1.0 - active / parts

    def draw(self, seed: int, name: str, slice_id: int, shape: Shape, level: float) -> np.ndarray:
        grid = draw_tile_mask(seed, name, slice_id, self.grid(shape), self.per_row(shape, level))
        return grid.repeat(self.tile, 0).repeat(self.tile, 1)

    def fault(self, masks: np.ndarray, shape: Shape, level: float) -> str | None:
        (rows, columns), size, per_row = self.grid(shape), self.tile, self.per_row(shape, level)
        inside = masks.reshape(-1, rows, size, columns, size).sum((2, 4), dtype=np.int64)
        active = inside > 0
        if ((inside[active] == size**2).all() and (active.sum(2) == per_row).all()
                and (active.sum(1) == per_row * rows // columns).all()):
            return None
        return f"of tiles of {size}, equally many in every row and column"

    def exchange(self, active: np.ndarray, to_die: np.ndarray, to_be_born: np.ndarray,
                 count: int) -> tuple[np.ndarray, np.ndarray]:
        return swap_tiles(active, to_die, to_be_born, count)

    def chosen(self, magnitudes: Tensor, level: float) -> Tensor:
        """Tiles with much weight, equally many in every row and column; not always those with the
        most, see `keep_largest_balanced`."""
        from megatron_spdf.sparsity.largest import keep_largest_balanced

        (rows, columns), size = self.grid(magnitudes.shape[1:]), self.tile
        by_tile = magnitudes.view(-1, rows, size, columns, size)
        kept = keep_largest_balanced(by_tile.double().sum((2, 4)),
                                     self.per_row(magnitudes.shape[1:], level))
        return kept[:, :, None, :, None].expand_as(by_tile).reshape(magnitudes.shape)

    @property
    def skips_zeros(self) -> bool:
        return has_tile_kernel(self.tile)

    @property
    def product_rate(self) -> str:
        return f"tile {self.tile}" if self.skips_zeros else super().product_rate

    def table_bytes(self, active: int) -> int:
        # each active tile by row and by column
        return 2 * 4 * active // self.tile**2 if self.skips_zeros else 0

    def describe(self, levels: list[float], degrees: int) -> str:
        asked = ", ".join(f"{level:g}" for level in levels)
        return (f"balanced tiles of {self.tile} x {self.tile}, to which level {asked} is rounded "
                f"below; tensor-parallel degrees: divisors of {degrees}")

    def grid(self, shape: Shape) -> Shape:
        """Returns (tile rows, tile columns) of a slice."""
        return shape[0] // self.tile, shape[1] // self.tile

    def per_row(self, shape: Shape, level: float) -> int:
        """Returns the number of active tiles in a tile row of a slice."""
        grid = self.grid(shape)
        active, parts = balanced_parts(grid, level)
        return grid[1] // parts * active


def balanced_parts(grid: Shape, level: float) -> Shape:
    """The balanced density next to 1 - `level` as a fraction, which is at least one active tile in
    a row and column.

    Args:
        grid: tiles (R, C) of a slice.

    Returns:
        Numerator and denominator; the latter is gcd(R, C).
    """
    parts = math.gcd(*grid)
    return min(parts, max(1, round((1.0 - level) * parts))), parts


def tile_slices(
    name: str, shape: Shape, axis: int, groups: int, level: float, size: int
) -> int:
    """Slices that a weight is cut into: the most, dividing `groups`, whose balanced tiles come
    within `CLOSE` of the level; where none do, those that come next to it.

    Args:
        name, shape, axis: of the weight (out, in), and the axis that is cut.
        groups: most slices, the number of query groups.
        size: of the tiles.

    Raises:
        ValueError: tiles do not divide the weight, or allow nothing near the level.
    """
    what = f"sparsity.tile={size} on {name} ({shape[0]} x {shape[1]})"
    if shape[0] % size or shape[1] % size:
        fitting = [b for b in (8, 16, 32, 64, 128) if shape[0] % b == 0 == shape[1] % b]
        raise ValueError(f"{what}: tiles must divide both axes; tile may be one of "
                         f"{fitting or [1]}, or give the weight a rule with level 0 that keeps it "
                         "dense")
    errors = {}
    for slices in (c for c in range(groups, 0, -1) if groups % c == 0 and shape[axis] % (c * size)
                   == 0):
        rows, columns = (n // (slices if i == axis else 1) // size for i, n in enumerate(shape))
        active, parts = balanced_parts((rows, columns), level)
        errors[slices] = abs(1.0 - active / parts - level) if active < parts else 1.0
    best = next((c for c, error in errors.items() if error <= CLOSE),
                min(errors, key=errors.__getitem__))
    if errors[best] > FAR:
        parts = math.gcd(shape[0] // size, shape[1] // size)
        raise ValueError(f"{what}: level={level:g} is over {FAR} from any that the same number of "
                         f"tiles in every row and column allows, the multiples of 1/{parts} under "
                         "1; take smaller tiles or another level")
    return best


def draw_tile_mask(seed: int, name: str, slice_id: int, grid: Shape,
                   per_row: int) -> np.ndarray:
    """The balanced tiles of one slice, from the stream keyed by (seed, name, slice).

    A pattern of consecutive tiles is stirred by trades (Strona et al. 2014): two tile rows share
    out anew, at random, the columns that only one of them has, which keeps the number of tiles of
    every row and column.

    Args:
        grid: tiles (R, C) of the slice.
        per_row: active tiles of a tile row.

    Returns:
        (R, C) bool.
    """
    rows, columns = grid
    assert 0 < per_row <= columns and rows * per_row % columns == 0, (grid, per_row)
    mask = np.zeros(grid, bool)
    mask[np.arange(rows)[:, None],
         (np.arange(rows)[:, None] * per_row + np.arange(per_row)) % columns] = True
    stream = Philox(key=stream_key(STREAM, seed, name, slice_id))
    for _ in range(ROUNDS):
        pairs = _order(stream, (rows,))[: rows // 2 * 2].reshape(-1, 2)
        _trade(mask, pairs, stream)
    return mask


def swap_tiles(active: np.ndarray, to_die: np.ndarray, to_be_born: np.ndarray,
               count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses tiles of a slice that die and are born two by two, so that every tile row and column
    keeps as many: where (i, j) and (p, q) die, (i, q) and (p, j) are born.

    The tile with the lowest score that is left dies together with one of those that are among the
    `count` lowest: the one with which the sum of the scores of the two that are born is lowest,
    ties by who dies first. Where it can with none of these, it dies with the lowest of the others
    that it can with; where there is none either, it stays. Who has died is not born again, and who
    is born does not die.

    Args, returns: see `Pattern.exchange`; of an odd `count` one stays.
    """
    births = np.full(active.shape, np.inf)  # scores of those that may be born
    births[~active] = to_be_born
    row, column = np.divmod(np.flatnonzero(active)[np.argsort(to_die, kind="stable")],
                            active.shape[1])
    alive, pairs = np.ones(len(row), bool), []
    for first in range(len(row)):
        if len(pairs) == count // 2:
            break
        second = _partner(first, count, row, column, alive, births) if alive[first] else None
        if second is not None:
            pairs.append((first, second))
            alive[[first, second]] = False
            births[row[[first, second]], column[[second, first]]] = np.inf
    one, two = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
    dead = np.concatenate([one, two])
    return (row[dead] * active.shape[1] + column[dead],
            row[dead] * active.shape[1] + column[np.concatenate([two, one])])


def _partner(first: int, count: int, row: np.ndarray, column: np.ndarray, alive: np.ndarray,
             births: np.ndarray) -> int | None:
    """Who dies together with tile `first` of those at (row, column), in the order of their scores;
    None: nobody can."""
    for lowest in (slice(count), slice(count, None)):
        sums = np.where(alive[lowest],
                        births[row[first], column[lowest]] + births[row[lowest], column[first]],
                        np.inf)
        able = np.flatnonzero(sums < np.inf)
        if len(able):
            return int(sums.argmin()) if lowest.stop else count + int(able[0])
    return None


def _trade(mask: np.ndarray, pairs: np.ndarray, stream: Philox) -> None:
    """Each pair of rows shares out anew the columns that only one of the two has."""
    left, right = mask[pairs[:, 0]], mask[pairs[:, 1]]
    both, one = left & right, left ^ right
    order = _order(stream, one.shape)
    rank = np.take_along_axis(np.take_along_axis(one, order, 1).cumsum(1),
                              order.argsort(1, kind="stable"), 1)
    first = one & (rank <= one.sum(1, keepdims=True) // 2)
    mask[pairs[:, 0]], mask[pairs[:, 1]] = both | first, both | (one & ~first)


def _order(stream: Philox, shape: tuple[int, ...]) -> np.ndarray:
    """A random order along the last axis; ties, of 64-bit words, by position."""
    return stream.random_raw(math.prod(shape)).reshape(shape).argsort(-1, kind="stable")


PATTERNS.register(Tiles.name, Tiles)
