"""Products with a weight of b x b blocks in Triton that compute on the active blocks only, where they lie.

A block is a tile of the compact values with a row stride of `per_row * b`; see `mask.Blocks`. Every block row and block
column of a chunk has the same number of active blocks, so that all programs of a launch do the same work. Sums are
fp32; fp32 operands are multiplied as such, not as TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels.mask import Mask


def forward(x: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """y = x W^T.

    Args:
        x: (N, in), N tokens.
        values: (chunks, active per chunk) of W (out, in).

    Returns:
        (N, out) in the dtype of x.
    """
    x, out = _rows(x), x.new_empty(len(x), mask.shape[0])
    tokens, depth, warps = _tiles(mask, x)
    grid = (mask.shape[0] // mask.blocks.size, triton.cdiv(len(x), tokens))
    _forward[grid](x, values.contiguous(), out, mask.blocks.columns, len(x), x.stride(0), mask.shape[0], mask.active,
                   SLOTS=mask.blocks.slots, PER_ROW=mask.blocks.per_row, SIZE=mask.blocks.size, TOKENS=tokens,
                   DEPTH=depth, num_warps=warps)
    return out


def input_gradient(gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """dx = dy W: (N, in) in the dtype of dy (N, out)."""
    gradient, out = _rows(gradient), gradient.new_empty(len(gradient), mask.shape[1])
    tokens, depth, warps = _tiles(mask, gradient)
    entries = mask.blocks.entries
    grid = (len(entries), triton.cdiv(len(gradient), tokens))
    _input_gradient[grid](gradient, values.contiguous(), out, entries, len(gradient), gradient.stride(0), mask.shape[1],
                          mask.active, IN_COLUMN=entries.shape[1], SLOTS=mask.blocks.slots, PER_ROW=mask.blocks.per_row,
                          SIZE=mask.blocks.size, TOKENS=tokens, DEPTH=depth, num_warps=warps)
    return out


def weight_gradient(gradient: Tensor, x: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
    """dW = dy^T x at the active blocks: (chunks, active per chunk).

    Args:
        gradient: dy, (N, out).
        x: (N, in).
        out: contiguous; what it is added to, in place, in its own precision.
    """
    gradient, x, adds = _rows(gradient), _rows(x), out is not None
    if out is None:
        out = x.new_empty(mask.chunks, mask.active)
    assert out.is_contiguous() and out.numel() == mask.chunks * mask.active, (out.shape, mask.shape)
    _, depth, warps = _tiles(mask, x)
    _weight_gradient[mask.blocks.columns.numel(),](
        gradient, x, out, mask.blocks.columns, len(x), gradient.stride(0), x.stride(0), mask.active,
        SLOTS=mask.blocks.slots, PER_ROW=mask.blocks.per_row, SIZE=mask.blocks.size, DEPTH=depth, ADDS=adds,
        num_warps=warps)
    return out


def _rows(x: Tensor) -> Tensor:
    """With values of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tiles(mask: Mask, x: Tensor) -> tuple[int, int, int]:
    """Tokens of a tile, depth of a step of its sum, and warps. Chosen by size alone, tuned on no GPU yet."""
    size = mask.blocks.size
    tokens = 128 if len(x) >= 128 else max(16, triton.next_power_of_2(len(x)))
    depth = min(size, 64 if x.element_size() == 2 else 32)
    return tokens, depth, 8 if size == 128 else 4


@triton.jit
def _tile(values, row, slot, active, PER_ROW: tl.constexpr, SIZE: tl.constexpr):
    """Where the active block with this block row and slot begins; its rows are PER_ROW * SIZE apart."""
    values += slot // PER_ROW * active.to(tl.int64) + row.to(tl.int64) * (SIZE * PER_ROW * SIZE)
    return values + slot % PER_ROW * SIZE


@triton.jit
def _forward(x, values, y, columns, tokens, stride_x, stride_y, active, SLOTS: tl.constexpr, PER_ROW: tl.constexpr,
             SIZE: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (token < tokens)[:, None]
    inner, outer = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    x += token.to(tl.int64)[:, None] * stride_x + inner[None, :]
    tile = outer[None, :] * (PER_ROW * SIZE) + inner[:, None]  # of W^T, (DEPTH, SIZE)
    total = tl.zeros((TOKENS, SIZE), tl.float32)
    for slot in range(SLOTS):
        column = tl.load(columns + row * SLOTS + slot)
        block = _tile(values, row, slot, active, PER_ROW, SIZE)
        for start in range(0, SIZE, DEPTH):
            a = tl.load(x + column * SIZE + start, mask=there, other=0.0)
            w = tl.load(block + tile + start)
            total = tl.dot(a, w, total, input_precision="ieee")
    y += token.to(tl.int64)[:, None] * stride_y + row * SIZE + outer[None, :]
    tl.store(y, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _input_gradient(gradient, values, out, entries, tokens, stride_gradient, stride_out, active,
                    IN_COLUMN: tl.constexpr, SLOTS: tl.constexpr, PER_ROW: tl.constexpr, SIZE: tl.constexpr,
                    TOKENS: tl.constexpr, DEPTH: tl.constexpr):
    column = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (token < tokens)[:, None]
    inner, outer = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    gradient += token.to(tl.int64)[:, None] * stride_gradient + inner[None, :]
    tile = inner[:, None] * (PER_ROW * SIZE) + outer[None, :]  # of W, (DEPTH, SIZE)
    total = tl.zeros((TOKENS, SIZE), tl.float32)
    for number in range(IN_COLUMN):
        entry = tl.load(entries + column * IN_COLUMN + number)
        row = entry // SLOTS
        block = _tile(values, row, entry % SLOTS, active, PER_ROW, SIZE)
        for start in range(0, SIZE, DEPTH):
            a = tl.load(gradient + row * SIZE + start, mask=there, other=0.0)
            w = tl.load(block + tile + start * (PER_ROW * SIZE))
            total = tl.dot(a, w, total, input_precision="ieee")
    out += token.to(tl.int64)[:, None] * stride_out + column * SIZE + outer[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _weight_gradient(gradient, x, out, columns, tokens, stride_gradient, stride_x, active, SLOTS: tl.constexpr,
                     PER_ROW: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr, ADDS: tl.constexpr):
    entry = tl.program_id(0)
    row, slot = entry // SLOTS, entry % SLOTS
    column = tl.load(columns + entry)
    inner, outer = tl.arange(0, DEPTH), tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(0, tokens, DEPTH):
        token = (first + inner).to(tl.int64)
        there = token < tokens
        a = tl.load(gradient + token[None, :] * stride_gradient + row * SIZE + outer[:, None], mask=there[None, :],
                    other=0.0)
        b = tl.load(x + token[:, None] * stride_x + column * SIZE + outer[None, :], mask=there[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    block = _tile(out, row, slot, active, PER_ROW, SIZE) + outer[:, None] * (PER_ROW * SIZE) + outer[None, :]
    if ADDS:
        total += tl.load(block)
    tl.store(block, total.to(out.dtype.element_ty))
