"""Backward of LayerNorm in Triton: the gradients of its input, weight and bias in one pass over
input and output gradient. PyTorch's takes two.

Shapes: N tokens of H entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels.program_shapes import NORM

NAME = f"triton {triton.__version__}"


def layer_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
                        residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input (N, H), weight (H,) and bias (H,); sums are fp32.

    Args:
        gradient: (N, H), of the output.
        x: (N, H).
        weight: (H,).
        mean, rstd: (N,) float32, of each token.
        residual: (N, H), a gradient of the input by another way, which is added; None: there is
            none.
    """
    x, gradient = x.contiguous(), gradient.contiguous()
    adds = residual is not None
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    programs, warps = min(NORM.programs, tokens), max(1, min(16, block // NORM.entries_of_a_warp))
    of_x = torch.empty_like(x)
    # of the tokens of each program; how many there are is the same on every GPU
    parts = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    _backward[programs,](gradient, x, weight, mean, rstd, residual.contiguous() if adds else x,
                         of_x, parts, tokens, width, BLOCK=block, ADDS=adds, num_warps=warps)
    of_weight, of_bias = parts.sum(1).to(weight.dtype)
    return of_x, of_weight, of_bias


@triton.jit
def _backward(gradient, x, weight, means, rstds, residual, of_x, parts, tokens, width,
              BLOCK: tl.constexpr, ADDS: tl.constexpr):
    """Takes the program's tokens, as many apart as there are programs."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    of_weight, of_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    row, step = program.to(tl.int64) * width + column, programs.to(tl.int64) * width
    for token in range(program, tokens, programs):
        of_y = tl.load(gradient + row, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = tl.load(means + token), tl.load(rstds + token)
        normed = (tl.load(x + row, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        of_weight += of_y * normed
        of_bias += of_y
        of_normed = of_y * scale  # zero outside, whatever `normed` is there
        along = tl.sum(of_normed * normed) / width
        found = rstd * (of_normed - tl.sum(of_normed) / width - normed * along)
        if ADDS:
            found += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x + row, found.to(of_x.dtype.element_ty), mask=inside)
        row += step
    place = parts + program * width + column
    tl.store(place, of_weight, mask=inside)
    tl.store(place + programs * width, of_bias, mask=inside)
