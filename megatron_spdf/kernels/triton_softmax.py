"""Softmax over the vocabulary in Triton: what its cross entropy needs of the logits, and their
gradient, each in one pass. Logits stay in their own precision, and sums are fp32.

Shapes: n tokens, `columns` of the vocabulary on this rank, of which the first `real` are tokens and
the others pad it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_spdf.kernels.program_shapes import SOFTMAX, SoftmaxShape

NAME = f"triton {triton.__version__}"


def sums(logits: Tensor, labels: Tensor, real: int, mean: bool,
         shape: SoftmaxShape = SOFTMAX["sums"]) -> Tensor:
    """Of each token the largest logit z, the sum of exp(z - the largest), the label's logit, and if
    asked for the sum of z: (3 or 4, n) float32. Of no columns, minus infinity and zeros.

    Args:
        logits: (n, columns), rows contiguous.
        labels: (n,) columns, of which those that are no column of this rank have no logit here.
        real: columns that are tokens.
        mean: whether the last sum is wanted.
        shape: of a program.
    """
    assert logits.stride(1) == 1, logits.stride()
    found = torch.empty(4 if mean else 3, len(logits), dtype=torch.float32, device=logits.device)
    _sums[len(logits),](logits, labels, found, logits.stride(0), logits.shape[1], real, MEAN=mean,
                        BLOCK=shape.columns, num_warps=shape.warps)
    return found


def gradient_(logits: Tensor, labels: Tensor, top: Tensor, total: Tensor, shares: Tensor, real: int,
              vocab_size: int, smoothing: float,
              shape: SoftmaxShape = SOFTMAX["gradient"]) -> None:
    """Turns logits into the gradients of share x smoothed cross entropy; see `model/head.py`.

    Args:
        logits, labels, real: as of `sums`.
        top, total: (n,) float32, the largest logit of the vocabulary, and the sum over it of exp(z
            - the largest).
        shares: (n,) float32.
        vocab_size: over all ranks.
        smoothing: share of the target that is spread over the vocabulary.
        shape: of a program.
    """
    assert logits.stride(1) == 1, logits.stride()
    columns = logits.shape[1]
    _gradient[len(logits), triton.cdiv(columns, shape.columns)](
        logits, labels, top, total, shares, logits.stride(0), columns, real, 1.0 - smoothing,
        smoothing / vocab_size, BLOCK=shape.columns, num_warps=shape.warps)


@triton.jit
def _sums(logits, labels, found, stride, columns, real, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Reads a token's logits once: where a block has a larger one, the sum so far is scaled down to
    it."""
    token = tl.program_id(0).to(tl.int64)
    tokens = tl.num_programs(0)
    logits += token * stride
    top, total, whole = float("-inf"), 0.0, 0.0
    lane, last = tl.arange(0, BLOCK), real // BLOCK * BLOCK
    for start in range(0, last, BLOCK):
        z = tl.load(logits + start + lane).to(tl.float32)
        if MEAN:
            whole += tl.sum(z)
        top, total = _join(z, top, total)
    for start in range(last, real, BLOCK):  # once, or never
        # Masked by a round number, so that loads are wide; what pads the vocabulary goes after.
        z = tl.load(logits + start + lane, mask=start + lane < columns, other=0.0).to(tl.float32)
        there = start + lane < real
        if MEAN:
            whole += tl.sum(tl.where(there, z, 0.0))
        top, total = _join(tl.where(there, z, float("-inf")), top, total)
    label = tl.load(labels + token)
    at_label = tl.load(logits + label, mask=(label >= 0) & (label < real), other=0.0)
    tl.store(found + token, top)
    tl.store(found + tokens + token, total)
    tl.store(found + 2 * tokens + token, at_label.to(tl.float32))
    if MEAN:
        tl.store(found + 3 * tokens + token, whole)


@triton.jit
def _join(z, top, total):
    """The largest, and the sum of exp(z - the largest), with more z."""
    larger = tl.maximum(top, tl.max(z))
    return larger, total * tl.exp(top - larger) + tl.sum(tl.exp(z - larger))


@triton.jit
def _gradient(logits, labels, tops, totals, shares, stride, columns, real, of_label, of_each,
              BLOCK: tl.constexpr):
    """Writes a block of a token's gradient over its logits."""
    token = tl.program_id(0).to(tl.int64)
    share = tl.load(shares + token)
    top, scale = tl.load(tops + token), share / tl.load(totals + token)
    label = tl.load(labels + token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + token * stride + column
    z = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
    gradient = tl.exp(z - top) * scale - of_each * share
    gradient = tl.where(column == label, gradient - of_label * share, gradient)
    gradient = tl.where(column < real, gradient, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < columns)
