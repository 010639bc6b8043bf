"""Balanced masks of blocks: a chunk is a grid of b x b blocks, active or zero as a whole, with the same number of
active blocks in every block row and the same in every block column.

So every program of a kernel has equal work, and the compact values of a chunk are a dense matrix (`kernels.mask`).
With R x C blocks and n active ones in a block row there are n R / C in a block column, a whole number where n is a
multiple of C / gcd(R, C): balanced densities are the multiples of 1 / gcd(R, C).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Philox

from megatron_spdf.random_streams import stream_key

STREAM = "megatron_spdf block stream 1"
ROUNDS = 32  # of trades; after few of them nothing is left of the first pattern
CLOSE, FAR = 0.01, 0.05  # of a level: rounded to without cutting into fewer chunks; refused
def balanced_parts(grid: tuple[int, int], level: float) -> tuple[int, int]:
    """The balanced density next to 1 - `level` as a fraction, which is at least one active block in a row and column.

    Args:
        grid: blocks (R, C) of a chunk.

    Returns:
        Numerator and denominator; the latter is gcd(R, C).
    """
    parts = math.gcd(*grid)
    return min(parts, max(1, round((1.0 - level) * parts))), parts


def block_chunks(
    name: str, shape: tuple[int, int], axis: int, groups: int, level: float, size: int | None
) -> int:
    """Chunks that a weight is cut into: `groups`, or with blocks the most, dividing `groups`, whose balanced blocks
    come within `CLOSE` of the level; where none do, those that come next to it.

    Args:
        name, shape, axis: of the weight (out, in), and the axis that is cut.
        groups: most chunks, the number of query groups.
        size: of the blocks; None: there are none.

    Raises:
        ValueError: blocks do not divide the weight, or allow nothing near the level.
    """
    if size is None:
        return groups
    what = f"sparsity.block={size} on {name} ({shape[0]} x {shape[1]})"
    if shape[0] % size or shape[1] % size:
        fitting = [b for b in (8, 16, 32, 64, 128) if shape[0] % b == 0 == shape[1] % b]
        raise ValueError(f"{what}: blocks must divide both axes; block may be one of {fitting or [1]}, or give the "
                         "weight a rule with level 0 that keeps it dense")
    errors = {}
    for chunks in (c for c in range(groups, 0, -1) if groups % c == 0 and shape[axis] % (c * size) == 0):
        rows, columns = (n // (chunks if i == axis else 1) // size for i, n in enumerate(shape))
        active, parts = balanced_parts((rows, columns), level)
        errors[chunks] = abs(1.0 - active / parts - level) if active < parts else 1.0
    best = next((c for c, error in errors.items() if error <= CLOSE), min(errors, key=errors.__getitem__))
    if errors[best] > FAR:
        parts = math.gcd(shape[0] // size, shape[1] // size)
        raise ValueError(f"{what}: level={level:g} is over {FAR} from any that the same number of blocks in every row "
                         f"and column allows, the multiples of 1/{parts} under 1; take smaller blocks or another level")
    return best


def draw_block_mask(seed: int, name: str, chunk: int, grid: tuple[int, int], per_row: int) -> np.ndarray:
    """The balanced blocks of one chunk, from the stream keyed by (seed, name, chunk).

    A pattern of consecutive blocks is stirred by trades (Strona et al. 2014): two block rows share out anew, at random,
    the columns that only one of them has, which keeps the number of blocks of every row and column.

    Args:
        grid: blocks (R, C) of the chunk.
        per_row: active blocks of a block row.

    Returns:
        (R, C) bool.
    """
    rows, columns = grid
    assert 0 < per_row <= columns and rows * per_row % columns == 0, (grid, per_row)
    mask = np.zeros(grid, bool)
    mask[np.arange(rows)[:, None], (np.arange(rows)[:, None] * per_row + np.arange(per_row)) % columns] = True
    stream = Philox(key=stream_key(STREAM, seed, name, chunk))
    for _ in range(ROUNDS):
        pairs = _order(stream, (rows,))[: rows // 2 * 2].reshape(-1, 2)
        _trade(mask, pairs, stream)
    return mask


def _trade(mask: np.ndarray, pairs: np.ndarray, stream: Philox) -> None:
    """Each pair of rows shares out anew the columns that only one of the two has."""
    left, right = mask[pairs[:, 0]], mask[pairs[:, 1]]
    both, one = left & right, left ^ right
    order = _order(stream, one.shape)
    rank = np.take_along_axis(np.take_along_axis(one, order, 1).cumsum(1), order.argsort(1, kind="stable"), 1)
    first = one & (rank <= one.sum(1, keepdims=True) // 2)
    mask[pairs[:, 0]], mask[pairs[:, 1]] = both | first, both | (one & ~first)


def _order(stream: Philox, shape: tuple[int, ...]) -> np.ndarray:
    """A random order along the last axis; ties, of 64-bit words, by position."""
    return stream.random_raw(math.prod(shape)).reshape(shape).argsort(-1, kind="stable")
