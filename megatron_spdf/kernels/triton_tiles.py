"""Products with a weight of b x b tiles in Triton that compute on the active tiles only, where they
lie.

A tile is a tile of the compact values with a row stride of `per_row * b`; see `tiles.TileTable`.
Every tile row and tile column of a slice has the same number of active tiles, so that all programs
of a launch do the same work. Sums are fp32; fp32 operands are multiplied as such, not as TF32.
Results are made transposed, a tile's rows or columns by
tokens: tensor cores take 64 rows at a time and up to 256 columns, and a tile may have only 64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels.mask import Mask
from megatron_spdf.kernels.tile_shapes import Tile, chosen


def forward(x: Tensor, values: Tensor, mask: Mask, tile: Tile | None = None) -> Tensor:
    """y = x W^T.

    Args:
        x: (N, in), N tokens.
        values: (slices, active per slice) of W (out, in).
        tile: of tokens; by default the one of `tiles`.

    Returns:
        (N, out) in the dtype of x.
    """
    x, out = _rows(x), x.new_empty(len(x), mask.shape[0])
    tile = tile or chosen("forward", mask.tables.size, len(x), x.element_size())
    grid = (mask.shape[0] // mask.tables.size, triton.cdiv(len(x), tile.width))
    _forward[grid](x, values.contiguous(), out, mask.tables.columns, len(x), x.stride(0),
                   mask.shape[0], mask.active, SLOTS=mask.tables.slots, PER_ROW=mask.tables.per_row,
                   SIZE=mask.tables.size, TOKENS=tile.width, DEPTH=tile.depth, num_warps=tile.warps,
                   num_stages=tile.stages)
    return out


def input_gradient(gradient: Tensor, values: Tensor, mask: Mask,
                   tile: Tile | None = None) -> Tensor:
    """dx = dy W: (N, in) in the dtype of dy (N, out)."""
    gradient, out = _rows(gradient), gradient.new_empty(len(gradient), mask.shape[1])
    entries, size = mask.tables.entries, mask.tables.size
    tile = tile or chosen("input_gradient", size, len(gradient), gradient.element_size())
    grid = (len(entries), triton.cdiv(len(gradient), tile.width))
    _input_gradient[grid](gradient, values.contiguous(), out, entries, len(gradient),
                          gradient.stride(0), mask.shape[1], mask.active,
                          IN_COLUMN=entries.shape[1], SLOTS=mask.tables.slots,
                          PER_ROW=mask.tables.per_row, SIZE=mask.tables.size, TOKENS=tile.width,
                          DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages)
    return out


def weight_gradient(gradient: Tensor, x: Tensor, mask: Mask, out: Tensor | None = None,
                    tile: Tile | None = None) -> Tensor:
    """dW = dy^T x at the active tiles: (slices, active per slice).

    Args:
        gradient: dy, (N, out).
        x: (N, in).
        out: contiguous; what it is added to, in place, in its own precision.
        tile: of rows of a tile; by default the one of `tiles`.
    """
    gradient, x, adds = _rows(gradient), _rows(x), out is not None
    if out is None:
        out = x.new_empty(mask.slices, mask.active)
    assert out.is_contiguous() and out.numel() == mask.slices * mask.active, (out.shape, mask.shape)
    tile = tile or chosen("weight_gradient", mask.tables.size, len(x), x.element_size())
    grid = (mask.tables.size // tile.width, mask.tables.columns.numel())
    _weight_gradient[grid](
        gradient, x, out, mask.tables.columns, len(x), gradient.stride(0), x.stride(0), mask.active,
        SLOTS=mask.tables.slots, PER_ROW=mask.tables.per_row, SIZE=mask.tables.size,
        ROWS=tile.width, DEPTH=tile.depth, ADDS=adds, num_warps=tile.warps, num_stages=tile.stages)
    return out


def _rows(x: Tensor) -> Tensor:
    """With values of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _tile(values, row, slot, active, PER_ROW: tl.constexpr, SIZE: tl.constexpr):
    """Where the active tile with this tile row and slot begins; its rows are PER_ROW * SIZE
    apart."""
    values += slot // PER_ROW * active.to(tl.int64) + row.to(tl.int64) * (SIZE * PER_ROW * SIZE)
    return values + slot % PER_ROW * SIZE


@triton.jit
def _forward(x, values, y, columns, tokens, stride_x, stride_y, active, SLOTS: tl.constexpr,
             PER_ROW: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (token < tokens)[None, :]
    inner, outer = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    x += token.to(tl.int64)[None, :] * stride_x + inner[:, None]  # x^T, (DEPTH, TOKENS)
    tile = outer[:, None] * (PER_ROW * SIZE) + inner[None, :]  # of W, (SIZE, DEPTH)
    total = tl.zeros((SIZE, TOKENS), tl.float32)
    # one loop: an inner one would begin with nothing on its way
    for step in range(SLOTS * (SIZE // DEPTH)):
        slot, start = step // (SIZE // DEPTH), step % (SIZE // DEPTH) * DEPTH
        column = tl.load(columns + row * SLOTS + slot)
        w = tl.load(_tile(values, row, slot, active, PER_ROW, SIZE) + tile + start)
        a = tl.load(x + column * SIZE + start, mask=there, other=0.0)
        total = tl.dot(w, a, total, input_precision="ieee")
    y += token.to(tl.int64)[None, :] * stride_y + row * SIZE + outer[:, None]
    tl.store(y, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _input_gradient(gradient, values, out, entries, tokens, stride_gradient, stride_out, active,
                    IN_COLUMN: tl.constexpr, SLOTS: tl.constexpr, PER_ROW: tl.constexpr,
                    SIZE: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr):
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
        row = entry // SLOTS
        w = tl.load(_tile(values, row, entry % SLOTS, active, PER_ROW, SIZE) + tile + start
                    * (PER_ROW * SIZE))
        a = tl.load(gradient + row * SIZE + start, mask=there, other=0.0)
        total = tl.dot(w, a, total, input_precision="ieee")
    out += token.to(tl.int64)[None, :] * stride_out + column * SIZE + outer[:, None]
    tl.store(out, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _weight_gradient(gradient, x, out, columns, tokens, stride_gradient, stride_x, active,
                     SLOTS: tl.constexpr, PER_ROW: tl.constexpr, SIZE: tl.constexpr,
                     ROWS: tl.constexpr, DEPTH: tl.constexpr, ADDS: tl.constexpr):
    entry = tl.program_id(1)
    row, slot = entry // SLOTS, entry % SLOTS
    column = tl.load(columns + entry)
    inner, side = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    outer = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # dy^T, (ROWS, DEPTH)
    gradient += inner.to(tl.int64)[None, :] * stride_gradient + row * SIZE + outer[:, None]
    x += inner.to(tl.int64)[:, None] * stride_x + column * SIZE + side[None, :]  # (DEPTH, SIZE)
    total = tl.zeros((ROWS, SIZE), tl.float32)
    for start in range(0, tokens, DEPTH):
        there = inner < tokens - start
        a = tl.load(gradient, mask=there[None, :], other=0.0)
        b = tl.load(x, mask=there[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        gradient += DEPTH * stride_gradient
        x += DEPTH * stride_x
    tile = (
        _tile(out, row, slot, active, PER_ROW, SIZE)
        + outer[:, None] * (PER_ROW * SIZE)
        + side[None, :]
    )
    if ADDS:
        total += tl.load(tile)
    tl.store(tile, total.to(out.dtype.element_ty))
