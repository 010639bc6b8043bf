"""Products with a weight of b x b tiles in Triton, on the active tiles alone, in place.

A tile is a strided square of the compact values, with rows `per_row * b` apart; see
`tiles.TileTable`. Every tile row and tile column of a slice has the same number of active tiles, so
all programs of a launch do the same work. Sums are fp32, and fp32 operands are multiplied as such,
not as TF32. Programs compute transposed results, a tile's rows or columns by tokens: tensor cores
take 64 rows and up to 256 columns at a time, and a tile may have only 64 rows or columns.

Shapes: N tokens; W (out, in) is the dense weight of this rank; `values` are its active values,
(slices, active per slice). In kernels SIZE is b, and SLOTS, PER_ROW and IN_COLUMN are numbers of
active tiles: in a tile row, in a tile row of one slice, and in a tile column.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels import triton_blocks
from megatron_spdf.kernels.mask import Mask
from megatron_spdf.kernels.program_shapes import ProgramShape, select_shape, select_weight_shape
from megatron_spdf.kernels.triton_blocks import is_hopper


def forward(x: Tensor, values: Tensor, mask: Mask, shape: ProgramShape | None = None,
            bias: Tensor | None = None) -> Tensor:
    """Product y = x W^T, and a bias if there is one.

    Args:
        x: (N, in).
        values: (slices, active per slice).
        mask: of W, with a `TileTable`.
        shape: of a program; default: `select_shape`.
        bias: (out,).

    Returns:
        (N, out) in the dtype of x.
    """
    table = mask.tables
    shape = shape or select_shape("forward", table.size, len(x), x.element_size(),
                                  is_hopper(x.device))
    if shape.stays:
        return triton_blocks.forward(x, values, mask, shape, bias)
    x, out = _rows(x), x.new_empty(len(x), mask.shape[0])
    grid = (mask.shape[0] // table.size, triton.cdiv(len(x), shape.width))
    _forward[grid](x, values.contiguous(), out, out if bias is None else bias, table.columns,
                   len(x), x.stride(0), mask.shape[0], mask.active, SLOTS=table.slots,
                   PER_ROW=table.per_row, SIZE=table.size, TOKENS=shape.width, DEPTH=shape.depth,
                   BIASED=bias is not None, num_warps=shape.warps, num_stages=shape.stages)
    return out


def input_gradient(gradient: Tensor, values: Tensor, mask: Mask,
                   shape: ProgramShape | None = None) -> Tensor:
    """Product dx = dy W.

    Args:
        gradient: dy, (N, out).
        values: (slices, active per slice).
        mask: of W, with a `TileTable`.
        shape: of a program; default: `select_shape`.

    Returns:
        (N, in) in the dtype of dy.
    """
    table, tokens = mask.tables, len(gradient)
    shape = shape or select_shape("input_gradient", table.size, tokens, gradient.element_size(),
                                  is_hopper(gradient.device))
    if shape.stays:
        return triton_blocks.input_gradient(gradient, values, mask, shape)
    gradient, out = _rows(gradient), gradient.new_empty(tokens, mask.shape[1])
    grid = (len(table.entries), triton.cdiv(tokens, shape.width))
    _input_gradient[grid](gradient, values.contiguous(), out, table.entries, tokens,
                          gradient.stride(0), mask.shape[1], mask.active,
                          IN_COLUMN=table.entries.shape[1], SLOTS=table.slots,
                          PER_ROW=table.per_row, SIZE=table.size, TOKENS=shape.width,
                          DEPTH=shape.depth, num_warps=shape.warps, num_stages=shape.stages)
    return out


def weight_gradient(gradient: Tensor, x: Tensor, mask: Mask, out: Tensor | None = None,
                    shape: ProgramShape | None = None) -> Tensor:
    """Product dW = dy^T x at the active tiles.

    Args:
        gradient: dy, (N, out).
        x: (N, in).
        mask: of W, with a `TileTable`.
        out: (slices, active per slice), contiguous; the product is added to it in place, in its
            own precision.
        shape: of a program; default: `select_weight_shape`.

    Returns:
        (slices, active per slice).
    """
    gradient, x, adds, table = _rows(gradient), _rows(x), out is not None, mask.tables
    if out is None:
        out = x.new_empty(mask.slices, mask.active)
    assert out.is_contiguous() and out.numel() == mask.slices * mask.active, (out.shape, mask.shape)
    shape = shape or select_weight_shape(table.size, *table.columns.shape, x.element_size(),
                                         is_hopper(x.device))
    group = math.gcd(shape.group, table.slots)
    grid = (table.size // shape.width, table.columns.numel() // group)
    _weight_gradient[grid](
        gradient, x, out, table.columns, len(x), gradient.stride(0), x.stride(0), mask.active,
        SLOTS=table.slots, PER_ROW=table.per_row, SIZE=table.size, ROWS=shape.width,
        DEPTH=shape.depth, GROUP=group, ADDS=adds, num_warps=shape.warps, num_stages=shape.stages)
    return out


def _rows(x: Tensor) -> Tensor:
    """The tensor, or a copy of it, contiguous along the last axis."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _tile(values, row, slot, active, PER_ROW: tl.constexpr, SIZE: tl.constexpr):
    """Address of the first entry of the active tile in a tile row and slot. Its rows are PER_ROW *
    SIZE apart."""
    values += slot // PER_ROW * active.to(tl.int64) + row.to(tl.int64) * (SIZE * PER_ROW * SIZE)
    return values + slot % PER_ROW * SIZE


@triton.jit
def _forward(x, values, y, bias, columns, tokens, stride_x, stride_y, active, SLOTS: tl.constexpr,
             PER_ROW: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
             BIASED: tl.constexpr):
    """Computes y^T, (SIZE, TOKENS), of one tile row, summed over its active tiles."""
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (token < tokens)[None, :]
    inner, outer = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    x += token.to(tl.int64)[None, :] * stride_x + inner[:, None]  # x^T, (DEPTH, TOKENS)
    tile = outer[:, None] * (PER_ROW * SIZE) + inner[None, :]  # of W, (SIZE, DEPTH)
    total = tl.zeros((SIZE, TOKENS), tl.float32)
    # A single loop over tiles and their depth keeps loads in flight. Those of an inner loop would
    # end with every tile.
    for step in range(SLOTS * (SIZE // DEPTH)):
        slot, start = step // (SIZE // DEPTH), step % (SIZE // DEPTH) * DEPTH
        column = tl.load(columns + row * SLOTS + slot)
        w = tl.load(_tile(values, row, slot, active, PER_ROW, SIZE) + tile + start)
        a = tl.load(x + column * SIZE + start, mask=there, other=0.0)
        total = tl.dot(w, a, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + row * SIZE + outer).to(tl.float32)[:, None]
    y += token.to(tl.int64)[None, :] * stride_y + row * SIZE + outer[:, None]
    tl.store(y, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _input_gradient(gradient, values, out, entries, tokens, stride_gradient, stride_out, active,
                    IN_COLUMN: tl.constexpr, SLOTS: tl.constexpr, PER_ROW: tl.constexpr,
                    SIZE: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr):
    """Computes dx^T, (SIZE, TOKENS), of one tile column, summed over its active tiles."""
    column = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (token < tokens)[None, :]
    inner, outer = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    # dy^T, (DEPTH, TOKENS)
    gradient += token.to(tl.int64)[None, :] * stride_gradient + inner[:, None]
    tile = inner[None, :] * (PER_ROW * SIZE) + outer[:, None]  # of W^T, (SIZE, DEPTH)
    total = tl.zeros((SIZE, TOKENS), tl.float32)
    for step in range(IN_COLUMN * (SIZE // DEPTH)):
        number, start = step // (SIZE // DEPTH), step % (SIZE // DEPTH) * DEPTH
        entry = tl.load(entries + column * IN_COLUMN + number)
        row = entry // SLOTS  # an entry is tile row * SLOTS + slot
        w = tl.load(_tile(values, row, entry % SLOTS, active, PER_ROW, SIZE) + tile
                    + start * (PER_ROW * SIZE))
        a = tl.load(gradient + row * SIZE + start, mask=there, other=0.0)
        total = tl.dot(w, a, total, input_precision="ieee")
    out += token.to(tl.int64)[None, :] * stride_out + column * SIZE + outer[:, None]
    tl.store(out, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _weight_gradient(gradient, x, out, columns, tokens, stride_gradient, stride_x, active,
                     SLOTS: tl.constexpr, PER_ROW: tl.constexpr, SIZE: tl.constexpr,
                     ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
                     ADDS: tl.constexpr):
    """Computes ROWS rows of GROUP active tiles of dW beside one another, summed over the tokens.

    The tiles share dy^T, and their columns of x are gathered to one operand.
    """
    number = tl.program_id(1)
    row, first = number // (SLOTS // GROUP), number % (SLOTS // GROUP) * GROUP
    inner, side = tl.arange(0, DEPTH), tl.arange(0, GROUP * SIZE)
    slot, within = first + side // SIZE, side % SIZE
    outer = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.load(columns + row * SLOTS + slot) * SIZE + within
    column = tl.max_contiguous(tl.multiple_of(column, SIZE), SIZE)  # those of a tile
    # dy^T, (ROWS, DEPTH)
    gradient += inner.to(tl.int64)[None, :] * stride_gradient + row * SIZE + outer[:, None]
    x += inner.to(tl.int64)[:, None] * stride_x + column[None, :]  # (DEPTH, GROUP * SIZE)
    total = tl.zeros((ROWS, GROUP * SIZE), tl.float32)
    for start in range(0, tokens, DEPTH):
        there = inner < tokens - start
        a = tl.load(gradient, mask=there[None, :], other=0.0)
        b = tl.load(x, mask=there[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        gradient += DEPTH * stride_gradient
        x += DEPTH * stride_x
    place = slot // PER_ROW * active.to(tl.int64) + slot % PER_ROW * SIZE + within
    place = tl.max_contiguous(tl.multiple_of(place, SIZE), SIZE)
    out += row.to(tl.int64) * (SIZE * PER_ROW * SIZE) + outer[:, None] * (PER_ROW * SIZE)
    out += place[None, :]
    if ADDS:
        total += tl.load(out)
    tl.store(out, total.to(out.dtype.element_ty))
