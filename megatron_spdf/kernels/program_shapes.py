"""Shapes of GPU programs: how a kernel's work is divided, and the candidates for tuning.

A shape follows from sizes alone, never from a trial at a run's start. Another shape sums in another
order, so a run that chose by trial would change, and a resumed run could not equal a straight one.
"""

from __future__ import annotations

import math
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
        stays: as many programs as the GPU has multiprocessors compute one result after another, and
            operands of the next are in flight while one is written; see `triton_blocks`.
    """

    width: int
    depth: int
    warps: int
    stages: int
    group: int = 1
    stays: bool = False

    @property
    def text(self) -> str:
        """Shape as tables show it."""
        several = f", {self.group} tiles" if self.group > 1 else ""
        return (f"{self.width} wide, {self.depth} deep, {self.warps} warps, {self.stages} stages"
                f"{several}{', stays' if self.stays else ''}")


class SoftmaxShape(NamedTuple):
    """Share of one GPU program in a softmax.

    Attributes:
        columns: of the vocabulary that are in registers at a time.
        warps: warps that run it.
    """

    columns: int
    warps: int


class NormShape(NamedTuple):
    """Shares of GPU programs in the backward of a norm.

    Attributes:
        programs: among which tokens are dealt out.
        entries_of_a_warp: of a token.
    """

    programs: int
    entries_of_a_warp: int


class SelectionShape(NamedTuple):
    """Share of one GPU program in a selection.

    Attributes:
        entries: of a row.
        warps: warps that run it.
        digit: bits of the threshold that a pass over the memory finds. A warp counts digits by
            votes, with instructions in proportion to the number of digits.
    """

    entries: int
    warps: int
    digit: int


# Candidates by the bytes of an entry; the first is used. Of those of two bytes it is the fastest
# for the weights of GPT-3 XL's layer together on an H100 (2026-11-28): 548 us, the others 582 and
# 557; with twice as many beside them 807, 803 and 1,264. The others have not been measured: by the
# machine code, these have the fewest instructions for all passes together, with few launches.
SELECTION = {2: (SelectionShape(4096, 4, 5), SelectionShape(4096, 8, 5),
                 SelectionShape(4096, 8, 8)),
             4: (SelectionShape(4096, 8, 8), SelectionShape(4096, 4, 5)),
             8: (SelectionShape(4096, 8, 8), SelectionShape(4096, 4, 5))}
# As fast as any tried on an H100 (2026-11-27): at 90% of what a copy reaches there.
SOFTMAX = {"sums": SoftmaxShape(4096, 4), "gradient": SoftmaxShape(4096, 8)}
NORM = NormShape(528, 512)  # four programs on each multiprocessor of a Hopper GPU
# Candidates for the warps of a program, by kernel; the first is used, the fastest on an H100. With
# few warps, a thread has many entries that share its work; with many, more programs fit.
WARPS = {"expand": (1, 2, 4), "compress": (4, 1, 2)}
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
    ("weight_gradient", 128): [ProgramShape(128, 64, 4, 3), ProgramShape(64, 64, 4, 4),
                               ProgramShape(128, 64, 8, 3), ProgramShape(64, 128, 4, 3)],
    ("weight_gradient", 64): [ProgramShape(64, 64, 4, 5), ProgramShape(64, 64, 4, 4),
                              ProgramShape(64, 128, 4, 3)],
}
# The same for GPUs of compute capability 9, which have the shared memory for these. On that H100,
# at 16,384 tokens, they were the fastest of ten to thirty of their kernel: the first two products
# for W_1 and W_2, the gradient for all four weights. Between L2 cache and multiprocessors a product
# of 64 x T entries has 64 T / (64 + T) operations a byte: 32 at T = 64, 43 at 128, 51 at 256, 57 at
# 512, and 64 at most, where some 50 are wanted for 2.5 times the speed of a dense product at 75%.
# So tiles of 64 are multiplied with many tokens, and their gradient is computed for many tiles.
HOPPER = {
    ("forward", 128): [ProgramShape(256, 64, 8, 3, stays=True)],
    ("forward", 64): [ProgramShape(256, 64, 8, 4, stays=True),
                      ProgramShape(256, 64, 4, 4, stays=True)],
    ("input_gradient", 128): [ProgramShape(256, 64, 8, 3, stays=True)],
    ("input_gradient", 64): [ProgramShape(256, 64, 4, 4, stays=True),
                             ProgramShape(256, 64, 8, 4, stays=True)],
    ("weight_gradient", 64): [ProgramShape(64, 64, 8, 3, 8), ProgramShape(64, 64, 8, 4, 4),
                              ProgramShape(64, 64, 4, 4, 2), ProgramShape(64, 64, 4, 4)],
}
# A candidate of a weight gradient with fewer programs keeps less than half of an H100 at work, so
# that the next one is faster.
FEW = 66


def candidates(kernel: str, size: int, hopper: bool) -> list[ProgramShape]:
    """Shapes that a kernel may take for tiles of `size` x `size` and 16-bit operands, by
    preference.

    Args:
        kernel: "forward", "input_gradient" or "weight_gradient".
        hopper: the GPU is of compute capability 9.
    """
    portable = CANDIDATES.get((kernel, size), [])
    return [*(HOPPER.get((kernel, size), []) if hopper else []), *portable]


def select_shape(kernel: str, size: int, tokens: int, bytes_each: int,
                 hopper: bool = False) -> ProgramShape:
    """Shape of a program of `forward` or `input_gradient` for tiles of `size` x `size`.

    It is no wider than the tokens, and half as deep for 32-bit operands.

    Args:
        kernel: "forward" or "input_gradient".
        size: side of a tile.
        tokens: number of tokens.
        bytes_each: bytes of an operand's entry, 2 or 4.
        hopper: the GPU is of compute capability 9.
    """
    some = candidates(kernel, size, hopper and bytes_each == 2) or [ProgramShape(128, size, 4, 3)]
    shape = next((s for s in some if not s.stays or tokens >= s.width), some[0])
    if bytes_each == 4:
        shape = shape._replace(depth=min(shape.depth, 32))
    if tokens < shape.width:
        shape = shape._replace(width=max(16, triton.next_power_of_2(tokens)))
    return shape


def select_weight_shape(size: int, rows: int, slots: int, bytes_each: int,
                        hopper: bool = False) -> ProgramShape:
    """Shape of a program of `weight_gradient`: the first that gives enough programs, else the one
    that gives the most.

    Args:
        size: side of a tile.
        rows: tile rows of the weight.
        slots: active tiles of a tile row.
        bytes_each: bytes of an operand's entry, 2 or 4.
        hopper: the GPU is of compute capability 9.
    """
    some = (candidates("weight_gradient", size, hopper and bytes_each == 2)
            or [ProgramShape(size, size, 4, 3)])
    numbers = [rows * slots // math.gcd(s.group, slots) * (size // s.width) for s in some]
    shape = next((s for s, number in zip(some, numbers, strict=True) if number >= FEW),
                 some[numbers.index(max(numbers))])
    return shape._replace(depth=min(shape.depth, 32)) if bytes_each == 4 else shape
