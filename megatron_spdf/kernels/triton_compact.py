"""Expand and compress in Triton, by the mask's bits: one pass over the bytes, without positions.

A program handles a span of a slice's entries. The number of active entries before the span is
stored (four bytes a span). The number before an entry within it follows from its bits.

Shapes: S slices, E entries and A active entries of a slice; W (out, in) is the dense weight of this
rank. `entry` is a place in a slice, `number` a place among its active values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels.mask import DTYPES, SPAN, Mask, ones
from megatron_spdf.kernels.program_shapes import WARPS

NAME = f"triton {triton.__version__}"


def make_index(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """Active entries of a slice before each span of `SPAN` entries: (S, spans) int32."""
    width = SPAN // 8  # bytes
    spans = triton.cdiv(bits.shape[1], width)
    padded = torch.nn.functional.pad(bits, (0, spans * width - bits.shape[1]))
    count = ones(padded).view(len(bits), spans, width).sum(-1)
    return (count.cumsum(-1) - count).int()


def supports(mask: Mask, *tensors: Tensor) -> bool:
    """True if the kernels support a mask and tensors of these dtypes.

    Places in a weight are counted in 32 bits, and the index must be one of `make_index`.
    """
    small = mask.shape[0] * mask.shape[1] < 2**31 and mask.index.dim() == 2
    return small and all(t.dtype in DTYPES for t in tensors)


def expand(values: Tensor, mask: Mask, warps: int = WARPS["expand"][0]) -> Tensor:
    """Dense weight (out, in): active values at their positions, zero elsewhere.

    Args:
        values: (S, A).
        warps: of a program.
    """
    dense = torch.empty(mask.shape, dtype=values.dtype, device=values.device)
    _expand[_grid(mask)](values.contiguous(), mask.bits, mask.index,
                         dense, *_geometry(mask, dense), SPAN=SPAN, num_warps=warps)
    return dense


def compress(dense: Tensor, mask: Mask, out: Tensor | None = None,
             warps: int = WARPS["compress"][0]) -> Tensor:
    """Active entries of a dense weight, or of its gradient: (S, A).

    Args:
        dense: (out, in), of any strides.
        out: (S, A), contiguous; the entries are added to it in place, in its own precision.
        warps: of a program.
    """
    adds = out is not None
    if out is None:
        out = torch.empty((mask.slices, mask.active), dtype=dense.dtype, device=dense.device)
    assert out.is_contiguous() and out.numel() == mask.slices * mask.active, (out.shape, mask.shape)
    _compress[_grid(mask)](dense, mask.bits, mask.index, out, *_geometry(mask, dense), SPAN=SPAN,
                           ADDS=adds, num_warps=warps)
    return out


def _grid(mask: Mask) -> tuple[int, int]:
    """Programs of a launch: one for each span of each slice."""
    return mask.index.shape[1], mask.slices


def _geometry(mask: Mask, dense: Tensor) -> tuple[int, ...]:
    """Sizes and strides for a kernel.

    Returns:
        Bytes of a slice's mask, E, columns of a slice, A, and strides, in entries, of the dense
            weight's rows, columns and slices.
    """
    slice_id = mask.slice_shape[mask.axis] * dense.stride(mask.axis)
    return (mask.bits.shape[1], mask.entries, mask.slice_shape[1], mask.active, dense.stride(0),
            dense.stride(1), slice_id)


@triton.jit
def _span(bits, counts, row_bytes, SPAN: tl.constexpr):
    """Finds this program's entries, as (SPAN / 8, 8) values each.

    Returns:
        The entry's place in the slice, whether it is active, and its number among the active ones.
    """
    slice_id = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * (SPAN // 8) + tl.arange(0, SPAN // 8)
    byte = tl.load(bits + slice_id * row_bytes + place, mask=place < row_bytes,
                   other=0).to(tl.int32)
    # Bit i of a byte moves to nibble i of a word. The product with 0x11111111 then sums nibbles:
    # nibble i of `up_to` is the number of set bits 0 to i, and nibble 7 that of the byte.
    spread = (byte | byte << 12) & 0x000F000F
    spread = (spread | spread << 6) & 0x03030303
    up_to = ((spread | spread << 3) & 0x11111111) * 0x11111111
    # Active entries of the slice up to the end of each byte.
    through = tl.load(counts + slice_id * tl.num_programs(0)
                      + tl.program_id(0)) + tl.cumsum(up_to >> 28 & 15, 0)
    entry = tl.arange(0, 8)[None, :]  # the first entry of a byte is its highest bit
    active = (byte[:, None] & (128 >> entry)) != 0
    # Entry j is bit 7 - j. The set bits 0 to 7 - j are this entry, if active, and those after it
    # in the byte, so the difference counts the active entries before it.
    number = through[:, None] - (up_to[:, None] >> (28 - 4 * entry) & 15)
    return place[:, None] * 8 + entry, active, number


@triton.jit
def _expand(values, bits, counts, dense, row_bytes, entries, columns, per_slice, stride_row,
            stride_column, stride_slice, SPAN: tl.constexpr):
    """Writes a span of the dense weight. An inactive entry gets zero, the value of a masked
    load."""
    slice_id = tl.program_id(1).to(tl.int64)
    entry, active, number = _span(bits, counts, row_bytes, SPAN)
    value = tl.load(values + slice_id * per_slice + number, mask=active, other=0.0)
    place = entry // columns * stride_row + entry % columns * stride_column
    tl.store(dense + slice_id * stride_slice + place, value, mask=entry < entries)


@triton.jit
def _compress(dense, bits, counts, out, row_bytes, entries, columns, per_slice, stride_row,
              stride_column, stride_slice, SPAN: tl.constexpr, ADDS: tl.constexpr):
    """Writes, or adds, the active entries of a span."""
    slice_id = tl.program_id(1).to(tl.int64)
    entry, active, number = _span(bits, counts, row_bytes, SPAN)
    place = entry // columns * stride_row + entry % columns * stride_column
    # Loads all entries: nearly every sector of memory holds an active one, and a load brings whole
    # sectors. Nobody reads them again.
    value = tl.load(dense + slice_id * stride_slice + place, mask=entry < entries, other=0.0,
                    eviction_policy="evict_first")
    # The flat order gives neighboring entries to neighboring threads. Active ones are neighbors in
    # the buffer, so that a warp's access is to few sectors of memory, each whole.
    value, active = tl.reshape(value, (SPAN,)), tl.reshape(active, (SPAN,))
    out += slice_id * per_slice + tl.reshape(number, (SPAN,))
    if ADDS:
        value = tl.load(out, mask=active, other=0.0) + value.to(out.dtype.element_ty)
    tl.store(out, value, mask=active)
