"""Shapes of GPU programs: how a kernel's work is divided, and the candidates for tuning.

A shape follows from sizes alone, never from a trial at a run's start. Another shape sums in another
order, so a run that chose by trial would change, and a resumed run could not equal a straight one.
"""

from __future__ import annotations

from typing import NamedTuple

import triton


class ProgramShape(NamedTuple):
    """Share of one GPU program in a product.

    Attributes:
        width: tokens of its result; of a weight gradient, rows of a tile.
        depth: terms of its sum that are multiplied at a time.
        warps: warps that run it.
        stages: steps of the sum whose operands are in flight at the same time.
        group: active tiles of a tile row that are computed together; of a weight gradient, and of
            fewer where their number in a tile row is no multiple. Their sums are the same.
    """

    width: int
    depth: int
    warps: int
    stages: int
    group: int = 1

    @property
    def text(self) -> str:
        """For a table."""
        several = f", {self.group} tiles" if self.group > 1 else ""
        return (f"{self.width} wide, {self.depth} deep, {self.warps} warps, {self.stages} stages"
                f"{several}")


class SoftmaxShape(NamedTuple):
    """Share of one GPU program in a softmax.

    Attributes:
        columns: of the vocabulary that are in registers at a time.
        warps: warps that run it.
    """

    columns: int
    warps: int


# Candidates of the softmax over the vocabulary, by kernel; the first is used.
SOFTMAX = {"sums": [SoftmaxShape(4096, 8), SoftmaxShape(8192, 8), SoftmaxShape(2048, 4)],
           "gradient": [SoftmaxShape(4096, 8), SoftmaxShape(2048, 4), SoftmaxShape(8192, 8)]}
class NormShape(NamedTuple):
    """Shares of GPU programs in the backward of a norm.

    Attributes:
        programs: among which tokens are dealt out.
        entries_of_a_warp: of a token.
    """

    programs: int
    entries_of_a_warp: int


NORM = NormShape(528, 512)  # four programs on each multiprocessor of a Hopper GPU
# Candidates for the warps of a program, by kernel; the first is used. With few warps, a thread has
# many entries that share its work.
WARPS = {"expand": (1, 2, 4), "compress": (1, 2, 4)}
# Candidates by kernel and tile size, for 16-bit operands; the first is used, and it is the fastest
# for the weights of GPT-3 XL's layer together at 75% on an H100 (2026-11-27, torch 2.11.0, triton
# 3.6.0, `tools/benchmark.py tiles`). The first two products look up in a table which operands a
# step needs, so with s stages only (s - 1) / 2 steps are in flight. Sums are as short as 512 terms.
WIDE = [ProgramShape(256, 64, 8, 5), ProgramShape(128, 64, 8, 5), ProgramShape(128, 64, 8, 3),
        ProgramShape(128, 128, 8, 3), ProgramShape(256, 64, 8, 3)]
NARROW = [ProgramShape(256, 64, 8, 5), ProgramShape(128, 64, 4, 5), ProgramShape(128, 64, 4, 7),
          ProgramShape(128, 64, 4, 3), ProgramShape(256, 64, 4, 5)]
CANDIDATES = {
    ("forward", 128): WIDE,
    ("forward", 64): NARROW,
    ("input_gradient", 128): WIDE,
    ("input_gradient", 64): NARROW,
    ("weight_gradient", 128): [ProgramShape(128, 64, 4, 3), ProgramShape(128, 64, 4, 4),
                               ProgramShape(128, 64, 8, 3), ProgramShape(64, 64, 4, 3),
                               ProgramShape(64, 64, 4, 4), ProgramShape(64, 128, 4, 3)],
    ("weight_gradient", 64): [ProgramShape(64, 64, 4, 5), ProgramShape(64, 64, 4, 4),
                              ProgramShape(64, 64, 4, 3), ProgramShape(64, 128, 4, 3),
                              ProgramShape(64, 128, 4, 4)],
}


def select_shape(kernel: str, size: int, tokens: int, bytes_each: int) -> ProgramShape:
    """Shape of a program for tiles of `size` x `size`.

    It is no wider than the tokens, and half as deep for 32-bit operands.

    Args:
        kernel: "forward", "input_gradient" or "weight_gradient".
        size: side of a tile.
        tokens: number of tokens.
        bytes_each: bytes of an operand's entry, 2 or 4.
    """
    weight = kernel == "weight_gradient"
    default = ProgramShape(size if weight else 128, size, 4, 3)
    shape = CANDIDATES.get((kernel, size), [default])[0]
    if bytes_each == 4:
        shape = shape._replace(depth=min(shape.depth, 32))
    if not weight and tokens < shape.width:
        shape = shape._replace(width=max(16, triton.next_power_of_2(tokens)))
    return shape
