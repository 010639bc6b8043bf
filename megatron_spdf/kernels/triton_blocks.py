"""Products with a weight of b x b tiles in Triton, for GPUs of compute capability 9.

Such a GPU moves blocks of a matrix between its memory and a multiprocessor's by itself (TMA), and
has a quarter of a megabyte there. Each multiprocessor runs one program, which computes one result
after another in a single loop: while a result is written, operands of the next one are in flight.
A step of the loop looks up in the table which operands the next step needs. Sums are those of
`triton_tiles`, in the same order, so that the number of multiprocessors is no matter.

Shapes: N tokens; W (out, in) is the dense weight of this rank; `values` are its active values,
(slices, active per slice), as a matrix (slices * rows, PER_ROW * SIZE) of which a tile is a block.
Letters of kernels as in `triton_tiles`; a result is SIZE x TOKENS.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_spdf.kernels.mask import Mask
from megatron_spdf.kernels.program_shapes import ProgramShape


@cache
def is_hopper(device: torch.device) -> bool:
    """True for a GPU of compute capability 9, for which the kernels were measured."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def forward(x: Tensor, values: Tensor, mask: Mask, shape: ProgramShape,
            bias: Tensor | None = None) -> Tensor:
    """Product y = x W^T, and a bias if there is one; arguments of `triton_tiles.forward`."""
    table, out = mask.tables, x.new_empty(len(x), mask.shape[0])
    _launch(_forward, x, values, out, mask, shape, (table.size, shape.depth),
            (out if bias is None else bias, table.columns), BIASED=bias is not None)
    return out


def input_gradient(gradient: Tensor, values: Tensor, mask: Mask, shape: ProgramShape) -> Tensor:
    """Product dx = dy W; arguments of `triton_tiles.input_gradient`."""
    table, out = mask.tables, gradient.new_empty(len(gradient), mask.shape[1])
    _launch(_input_gradient, gradient, values, out, mask, shape, (shape.depth, table.size),
            (table.entries,), IN_COLUMN=table.entries.shape[1])
    return out


def _launch(kernel: triton.JITFunction, operand: Tensor, values: Tensor, out: Tensor, mask: Mask,
            shape: ProgramShape, piece: tuple[int, int], tensors: tuple[Tensor, ...],
            **constants: int) -> None:
    """Starts a program a multiprocessor, or one a result where there are fewer.

    Args:
        operand: (N, in) or (N, out).
        out: (N, out) or (N, in).
        piece: part of a tile of `values` that a step of the loop multiplies.
        tensors: further operands of the kernel.
    """
    table, blocks = mask.tables, triton.cdiv(len(operand), shape.width)
    bands = out.shape[1] // table.size  # tile rows or tile columns
    matrix = values.reshape(-1, table.per_row * table.size)
    kernel[(min(_multiprocessors(operand.device), bands * blocks),)](
        _describe(_aligned(operand), shape.width, shape.depth), _describe(matrix, *piece),
        _describe(out, shape.width, table.size), *tensors, len(matrix) // mask.slices, bands,
        blocks, SLOTS=table.slots, PER_ROW=table.per_row, SIZE=table.size, TOKENS=shape.width,
        DEPTH=shape.depth, num_warps=shape.warps, num_stages=shape.stages, **constants)


@cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; in Triton's interpreter, few enough for several results of a
    program."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy of it, with rows of their own that are contiguous and begin at
    multiples of 16 bytes."""
    begins = x.data_ptr() | x.stride(0) * x.element_size()
    fits = x.stride(1) == 1 and x.stride(0) >= x.shape[1] and begins % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _describe(x: Tensor, *block: int) -> TensorDescriptor:
    """A matrix that is moved in blocks of this shape."""
    return TensorDescriptor.from_tensor(x, list(block))


@triton.jit
def _forward(x, values, y, bias, columns, slice_rows, rows, blocks, SLOTS: tl.constexpr,
             PER_ROW: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
             BIASED: tl.constexpr):
    """Computes y^T of one tile row and block of tokens after another.

    Tile rows come first, so that programs that run at the same time share tokens.
    """
    result, step = tl.program_id(0), 0
    steps: tl.constexpr = SLOTS * (SIZE // DEPTH)
    mine = (rows * blocks - result + tl.num_programs(0) - 1) // tl.num_programs(0)
    outer = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, TOKENS), tl.float32)
    column = tl.load(columns + result % rows * SLOTS)
    for _ in range(mine * steps):
        row, token = result % rows, result // rows * TOKENS
        slot, start = step // (SIZE // DEPTH), step % (SIZE // DEPTH) * DEPTH
        w = values.load([slot // PER_ROW * slice_rows + row * SIZE, slot % PER_ROW * SIZE + start])
        a = x.load([token, column * SIZE + start])
        total = tl.dot(w, a.T, total)
        if step == steps - 1:
            if BIASED:
                total += tl.load(bias + row * SIZE + outer).to(tl.float32)[:, None]
            y.store([token, row * SIZE], total.T.to(y.dtype))
            total = tl.zeros((SIZE, TOKENS), tl.float32)
        step += 1
        result = tl.where(step == steps, result + tl.num_programs(0), result)
        step = tl.where(step == steps, 0, step)
        column = tl.load(columns + min(result, rows * blocks - 1) % rows * SLOTS
                         + step // (SIZE // DEPTH))


@triton.jit
def _input_gradient(gradient, values, out, entries, slice_rows, columns, blocks,
                    IN_COLUMN: tl.constexpr, SLOTS: tl.constexpr, PER_ROW: tl.constexpr,
                    SIZE: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr):
    """Computes dx^T of one tile column and block of tokens after another."""
    result, step = tl.program_id(0), 0
    steps: tl.constexpr = IN_COLUMN * (SIZE // DEPTH)
    mine = (columns * blocks - result + tl.num_programs(0) - 1) // tl.num_programs(0)
    total = tl.zeros((SIZE, TOKENS), tl.float32)
    entry = tl.load(entries + result % columns * IN_COLUMN)  # tile row * SLOTS + slot
    for _ in range(mine * steps):
        column, token = result % columns, result // columns * TOKENS
        start = step % (SIZE // DEPTH) * DEPTH
        row, slot = entry // SLOTS, entry % SLOTS
        w = values.load([slot // PER_ROW * slice_rows + row * SIZE + start, slot % PER_ROW * SIZE])
        a = gradient.load([token, row * SIZE + start])
        total = tl.dot(w.T, a.T, total)
        if step == steps - 1:
            out.store([token, column * SIZE], total.T.to(out.dtype))
            total = tl.zeros((SIZE, TOKENS), tl.float32)
        step += 1
        result = tl.where(step == steps, result + tl.num_programs(0), result)
        step = tl.where(step == steps, 0, step)
        entry = tl.load(entries + min(result, columns * blocks - 1) % columns * IN_COLUMN
                        + step // (SIZE // DEPTH))
