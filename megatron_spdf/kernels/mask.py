"""What the kernels know of a compact weight's mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPAN = 1024  # entries of a slice between two counts of the active ones before
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of Triton's kernels


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
        tables: what a product with the values derives from the bits, where there is one.
    """

    bits: Tensor
    index: Tensor
    shape: tuple[int, int]
    slice_shape: tuple[int, int]
    axis: int
    active: int
    tables: Any = None

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
