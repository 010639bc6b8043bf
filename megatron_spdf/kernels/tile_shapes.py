"""How kernels are cut up for the programs of a GPU: what is taken, and what else is worth a trial.

What is taken follows from sizes alone, never from a trial at a run's start: sums in another order
would make another run of it, and a resumed run could not equal a straight one.
"""

from __future__ import annotations

from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """A program's share of a product with 16-bit operands.

    Attributes:
        width: tokens of its result; of a weight gradient, rows of a tile.
        depth: terms of its sum that are multiplied at a time.
        warps: that it has.
        stages: steps of the sum whose operands are on their way at the same time.
    """

    width: int
    depth: int
    warps: int
    stages: int


# Warps of a program, by kernel; the first number is taken. With few, a thread has many entries to
# share its work.
WARPS = {"expand": (1, 2, 4), "compress": (1, 2, 4)}
# By kernel and size of the tiles; the first tile is taken. What a step of the first two products
# needs is found by a table, so that of s stages (s - 1) / 2 steps are on their way. Their sums are
# as short as 512 terms in GPT-3 XL: two programs or more of what is taken fit on a Hopper
# multiprocessor, so that one begins or ends while another multiplies. `tools/benchmark.py tiles`
# tries them all.
WIDE = [Tile(128, 64, 8, 5), Tile(128, 64, 8, 3), Tile(128, 128, 8, 3), Tile(256, 64, 8, 5),
        Tile(256, 64, 8, 3)]
NARROW = [Tile(128, 64, 4, 5), Tile(128, 64, 4, 7), Tile(128, 64, 4, 3), Tile(256, 64, 8, 5),
          Tile(256, 64, 4, 5)]
CANDIDATES = {
    ("forward", 128): WIDE,
    ("forward", 64): NARROW,
    ("input_gradient", 128): WIDE,
    ("input_gradient", 64): NARROW,
    ("weight_gradient", 128): [Tile(128, 64, 8, 3), Tile(128, 64, 8, 4), Tile(64, 64, 4, 3),
                               Tile(64, 64, 4, 4), Tile(64, 128, 4, 3)],
    ("weight_gradient", 64): [Tile(64, 64, 4, 4), Tile(64, 64, 4, 3), Tile(64, 128, 4, 3),
                              Tile(64, 128, 4, 4)],
}


def chosen(kernel: str, size: int, tokens: int, bytes_each: int) -> Tile:
    """The tile for tiles of a size: no wider than the tokens that there are, half as deep for 32
    bits.

    Args:
        bytes_each: of an operand's entry, 2 or 4.
    """
    weight = kernel == "weight_gradient"
    tile = CANDIDATES.get((kernel, size), [Tile(size if weight else 128, size, 4, 3)])[0]
    if bytes_each == 4:
        tile = tile._replace(depth=min(tile.depth, 32))
    if not weight and tokens < tile.width:
        tile = tile._replace(width=max(16, triton.next_power_of_2(tokens)))
    return tile
