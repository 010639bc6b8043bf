"""Masks that are 2:4 both ways: of every four entries of a row, and of every four of a column, two
are active.

Sparse tensor cores multiply with two of every four entries along the axis that is summed over. That
is a weight's rows in the forward pass and its columns for the input's gradient, so a mask that
serves both must be transposable (Hubara et al. 2021): every tile of 4 x 4 is one of the 90 0/1
matrices with two ones in each row and column.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Philox

from megatron_spdf.random_streams import stream_key
from megatron_spdf.sparsity.patterns.base import PATTERNS, Pattern, Shape

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

STREAM = "megatron_spdf 2:4 stream 1"
LEVEL, SIDE = 0.5, 4
AT_ONCE = 2**16  # tiles whose 90 sums are held at a time


def _all_tiles() -> np.ndarray:
    """(90, 4, 4) bool, in lexicographic order of their rows."""
    rows = np.array(sorted(set(itertools.permutations((0, 0, 1, 1)))), dtype=bool)
    tiles = rows[np.array(list(itertools.product(range(len(rows)), repeat=SIDE)))]
    return tiles[(tiles.sum(axis=1) == 2).all(axis=1)]


TILES = _all_tiles()


class TwoFour(Pattern):
    """Two of every four entries of a row, and two of every four of a column."""

    name = "2:4"
    columns_together = SIDE

    def cut(self, name: str, shape: Shape, axis: int, most: int, level: float) -> int:
        check_two_four(name, shape, axis, most, level)
        return most

    def draw(self, seed: int, name: str, slice_id: int, shape: Shape, level: float) -> np.ndarray:
        return draw_two_four(seed, name, slice_id, shape)

    def fault(self, masks: np.ndarray, shape: Shape, level: float) -> str | None:
        return None if is_two_four(masks, shape) else "2:4 along rows and columns"

    def chosen(self, magnitudes: Tensor, level: float) -> Tensor:
        import torch

        slices, rows, columns = magnitudes.shape
        tiles = magnitudes.view(slices, rows // SIDE, SIDE, columns // SIDE, SIDE).transpose(2, 3)
        masks = magnitudes.new_tensor(TILES.reshape(len(TILES), -1))
        best = [(some @ masks.T).argmax(1) for some in tiles.reshape(-1, SIDE**2).split(AT_ONCE)]
        kept = masks[torch.cat(best)].bool()
        return kept.view(tiles.shape).transpose(2, 3).reshape(magnitudes.shape)

    @property
    def product_rate(self) -> str:
        return self.name

    def describe(self, levels: list[float], degrees: int) -> str:
        return "2:4, two of every four weights along rows and along columns"


def check_two_four(name: str, shape: Shape, axis: int, slices: int, level: float) -> None:
    """Requires that a weight can be 2:4.

    Args:
        name, shape, axis, slices: of the weight (out, in), the axis that is cut, and into how many
            slices.

    Raises:
        ValueError: at this level, or with slices that tiles of 4 x 4 do not fill.
    """
    what = f"sparsity.pattern=2:4 on {name} ({shape[0]} x {shape[1]})"
    if level != LEVEL:
        raise ValueError(f"{what}: level={level:g}, and two of every four weights active are level "
                         f"{LEVEL}; take that, or 0 in a rule for weights that stay dense, or "
                         "another pattern")
    rows, columns = (n // (slices if i == axis else 1) for i, n in enumerate(shape))
    if rows % SIDE or columns % SIDE:
        raise ValueError(f"{what}: its {slices} slices, one for each of model.query_groups, are "
                         f"{rows} x {columns}, and tiles of {SIDE} x {SIDE} must fill them; take a "
                         f"model.hidden and ffn_hidden that are multiples of {SIDE * slices}, or "
                         "give the weight a rule with level 0 that keeps it dense")


def draw_two_four(seed: int, name: str, slice_id: int, shape: Shape) -> np.ndarray:
    """The mask of one slice, every tile equally likely to be each of the 90, from the stream keyed
    by (seed, name, slice).

    Args:
        shape: (rows, columns) of the slice, multiples of 4.

    Returns:
        (rows, columns) bool.
    """
    rows, columns = (n // SIDE for n in shape)
    assert (rows * SIDE, columns * SIDE) == tuple(shape), shape
    words = Philox(key=stream_key(STREAM, seed, name, slice_id)).random_raw(-(-rows * columns // 2))
    words = words.astype("<u8", copy=False).view("<u4")[: rows * columns]
    # off from even by less than 2^-25
    drawn = (words.astype(np.uint64) * len(TILES) >> 32).astype(np.intp)
    return _joined(drawn, shape)


def _joined(numbers: np.ndarray, shape: Shape) -> np.ndarray:
    """The mask whose tiles have these numbers, row by row."""
    rows, columns = (n // SIDE for n in shape)
    return TILES[numbers].reshape(rows, columns, SIDE, SIDE).swapaxes(1, 2).reshape(shape)


def is_two_four(masks: np.ndarray, shape: Shape) -> bool:
    """True if masks of slices of a shape, (slices, entries) bool, are 2:4 both ways."""
    rows, columns = (n // SIDE for n in shape)
    entries = masks.astype(np.uint8, copy=False).reshape(len(masks), rows, SIDE, columns, SIDE)
    # Slices added up: sums over axes of four are ten times as slow.
    along_columns = sum(entries[:, :, i] for i in range(SIDE))
    along_rows = sum(entries[..., i] for i in range(SIDE))
    return bool((along_columns == 2).all() and (along_rows == 2).all())


PATTERNS.register(TwoFour.name, TwoFour)
