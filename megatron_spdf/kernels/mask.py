"""Mask of a compact weight, as the kernels read it.

Shapes: S slices, E entries and A active entries of a slice, n = S A; W (out, in) is the dense
weight of this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPAN = 1024  # entries of a slice for which one count is kept, and which one GPU program handles
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of Triton's kernels


@dataclass(frozen=True)
class Mask:
    """Mask of this rank's slices of a weight.

    Attributes:
        bits: (S, ceil(E / 8)) uint8, one bit an entry in row-major order, in the order of
            numpy.packbits.
        index: result of `dispatch.make_index` on the bits: (n,) positions for PyTorch, or (S,
            spans) counts for Triton.
        shape: (out, in) of this rank's dense weight.
        slice_shape: (out, in) of a slice.
        axis: along which the slices lie beside one another in the weight.
        active: A, active entries of each slice.
        tables: tables of a product with the values, derived from the bits; None without one.
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
        """S, slices of this rank."""
        return len(self.bits)

    @property
    def entries(self) -> int:
        """E, entries of a slice."""
        return math.prod(self.slice_shape)


def unpack(bits: Tensor, entries: int) -> Tensor:
    """Entries of slices, (S, E) bool, from their packed bits.

    Args:
        bits: (S, ceil(E / 8)) uint8.
        entries: E.
    """
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)  # highest bit first
    return (bits.unsqueeze(-1) >> shifts & 1).view(len(bits), -1)[:, :entries].bool()


def pack(masks: Tensor) -> Tensor:
    """Inverse of `unpack`: packed bits (S, ceil(E / 8)) uint8 of (S, E) bool."""
    slices, entries = masks.shape
    padded = masks.new_zeros(slices, -(-entries // 8), 8, dtype=torch.uint8)
    padded.view(slices, -1)[:, :entries] = masks
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def ones(bits: Tensor) -> Tensor:
    """The number of entries that are set in each byte of packed bits, uint8; without a table, which
    a GPU's host would wait for."""
    pairs = bits - (bits >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return fours + (fours >> 4) & 0x0F


def positions(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """Row-major positions in the dense weight of the active entries, slice after slice: (n,) int64.

    Args:
        bits: (S, ceil(E / 8)) uint8.
        slice_shape: (out, in) of a slice.
        axis: along which the slices lie beside one another.
    """
    slices, (rows, columns) = len(bits), slice_shape
    active = unpack(bits, rows * columns)
    slice_id, entry = active.nonzero(as_tuple=True)
    if axis == 0:  # slices are one after another in memory
        return slice_id * (rows * columns) + entry
    # Slices are side by side: a row of the weight is one row of each slice.
    return entry // columns * (columns * slices) + slice_id * columns + entry % columns
