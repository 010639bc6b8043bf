"""Expand and compress in Triton, driven by the mask's bits: one pass over the bytes that must move,
no positions.

A program takes a span of a slice's entries. How many active entries come before the span is stored
(four bytes a span); how many come before an entry within it follows from its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels.mask import DTYPES, SPAN, Mask
from megatron_spdf.kernels.tile_shapes import WARPS

NAME = f"triton {triton.__version__}"


def make_index(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """Active entries of a slice before each span of `SPAN` entries: (slices, spans) int32."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.int32,
                        device=bits.device)
    width = SPAN // 8
    spans = triton.cdiv(bits.shape[1], width)
    padded = torch.nn.functional.pad(bits, (0, spans * width - bits.shape[1]))
    count = ones[padded.int()].view(len(bits), spans, width).sum(-1)
    return (count.cumsum(-1) - count).int()


def supports(mask: Mask, *tensors: Tensor) -> bool:
    """Places in a weight are counted in 32 bits."""
    small = mask.shape[0] * mask.shape[1] < 2**31 and mask.index.dim() == 2
    return small and all(t.dtype in DTYPES for t in tensors)


def expand(values: Tensor, mask: Mask, warps: int = WARPS["expand"][0]) -> Tensor:
    """The dense weight (out, in): active values at their positions, zero elsewhere."""
    dense = torch.empty(mask.shape, dtype=values.dtype, device=values.device)
    _expand[_grid(mask)](values.contiguous(), mask.bits, mask.index,
                         dense, *_geometry(mask, dense), SPAN=SPAN, num_warps=warps)
    return dense


def compress(dense: Tensor, mask: Mask, out: Tensor | None = None,
             warps: int = WARPS["compress"][0]) -> Tensor:
    """The entries of a dense weight, or of its gradient, at the active positions: (slices, active
    per slice).

    Args:
        dense: (out, in), of any strides.
        out: contiguous; what they are added to, in place, in its own precision.
    """
    adds = out is not None
    if out is None:
        out = torch.empty((mask.slices, mask.active), dtype=dense.dtype, device=dense.device)
    assert out.is_contiguous() and out.numel() == mask.slices * mask.active, (out.shape, mask.shape)
    _compress[_grid(mask)](dense, mask.bits, mask.index, out, *_geometry(mask, dense), SPAN=SPAN,
                           ADDS=adds, num_warps=warps)
    return out


def _grid(mask: Mask) -> tuple[int, int]:
    return mask.index.shape[1], mask.slices


def _geometry(mask: Mask, dense: Tensor) -> tuple[int, ...]:
    """Bytes of a slice's mask, entries, columns and active entries of a slice; strides of the dense
    weight's rows, columns and slices."""
    slice_id = mask.slice_shape[mask.axis] * dense.stride(mask.axis)
    return (mask.bits.shape[1], mask.entries, mask.slice_shape[1], mask.active, dense.stride(0),
            dense.stride(1), slice_id)


@triton.jit
def _span(bits, counts, row_bytes, SPAN: tl.constexpr):
    """Of this program's entries, (SPAN / 8, 8): number in the slice, whether active, number among
    the active ones.

    A byte's bits are spread over the nibbles of a word, so that one product counts the bits up to
    each of them.
    """
    slice_id = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * (SPAN // 8) + tl.arange(0, SPAN // 8)
    byte = tl.load(bits + slice_id * row_bytes + place, mask=place < row_bytes,
                   other=0).to(tl.int32)
    spread = (byte | byte << 12) & 0x000F000F
    spread = (spread | spread << 6) & 0x03030303
    up_to = ((spread | spread << 3) & 0x11111111) * 0x11111111
    through = tl.load(counts + slice_id * tl.num_programs(0)
                      + tl.program_id(0)) + tl.cumsum(up_to >> 28 & 15, 0)
    entry = tl.arange(0, 8)[None, :]  # the first entry of a byte is its highest bit
    active = (byte[:, None] & (128 >> entry)) != 0
    number = through[:, None] - (up_to[:, None] >> (28 - 4 * entry) & 15)
    return place[:, None] * 8 + entry, active, number


@triton.jit
def _expand(values, bits, counts, dense, row_bytes, entries, columns, per_slice, stride_row,
            stride_column, stride_slice, SPAN: tl.constexpr):
    slice_id = tl.program_id(1).to(tl.int64)
    entry, active, number = _span(bits, counts, row_bytes, SPAN)
    value = tl.load(values + slice_id * per_slice + number, mask=active, other=0.0)
    place = entry // columns * stride_row + entry % columns * stride_column
    tl.store(dense + slice_id * stride_slice + place, value, mask=entry < entries)


@triton.jit
def _compress(dense, bits, counts, out, row_bytes, entries, columns, per_slice, stride_row,
              stride_column, stride_slice, SPAN: tl.constexpr, ADDS: tl.constexpr):
    slice_id = tl.program_id(1).to(tl.int64)
    entry, active, number = _span(bits, counts, row_bytes, SPAN)
    place = entry // columns * stride_row + entry % columns * stride_column
    # All entries, since nearly every sector holds an active one, and whole sectors come in one
    # load.
    value = tl.load(dense + slice_id * stride_slice + place, mask=entry < entries, other=0.0)
    out += slice_id * per_slice
    if ADDS:
        value = tl.load(out + number, mask=active, other=0.0) + value.to(out.dtype.element_ty)
    tl.store(out + number, value, mask=active)
