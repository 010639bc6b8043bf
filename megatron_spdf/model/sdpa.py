"""Attention on PyTorch's scaled_dot_product_attention, and which of its kernels computes it on a
GPU.

PyTorch goes from one kernel to the next in silence, the last being its own operations one by one,
which store T x T scores. Here fused kernels are asked for by name, and what they do not take is
found out once, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
FUSED_WITH_MASK = (SDPBackend.EFFICIENT_ATTENTION,)


@dataclass(frozen=True)
class Heads:
    """What decides which kernels take an attention: those of a tensor-parallel rank.

    Attributes:
        width: of a head.
        masked: with a mask beyond the causal one.
    """

    queries: int
    groups: int
    width: int
    dtype: torch.dtype
    dropout: float
    masked: bool

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups != self.queries else ""
        mask = " and a mask" if self.masked else ""
        return (f"{self.queries} heads of {self.width}{groups} in "
                f"{str(self.dtype).removeprefix('torch.')}{mask}")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0,
           scale: float | None = None,
           ) -> Tensor:
    """softmax(QK^T x scale) V, causal unless there is a mask: (B, nh, T, hs), (B, ng, T, hs) twice
    -> (B, nh, T, hs).

    Args:
        mask: (B, 1, T, T) bool, true where query i may attend to key j.
        scale: 1 / sqrt(hs) if None.
    """
    if mask is not None and k.size(1) != q.size(1):  # kernels that take masks take no groups
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                        dropout_p=dropout, scale=scale,
                                        enable_gqa=q.size(1) != k.size(1))


def on_kernels(q: Tensor, k: Tensor, masked: bool, dropout: float) -> AbstractContextManager:
    """A context in which attention runs on the kernels chosen for its device; on CPU there is no
    choice."""
    if not q.is_cuda:
        return nullcontext()
    return sdpa_kernel(list(kernels_on_gpu(Heads(q.size(1), k.size(1), q.size(3), q.dtype, dropout,
                                                 masked))))


@lru_cache
def kernels_on_gpu(heads: Heads) -> tuple[SDPBackend, ...]:
    """`choose_kernels`, tried out on this GPU."""
    return choose_kernels(heads, _runs_on_gpu)


def choose_kernels(heads: Heads,
                   runs: Callable[[Sequence[SDPBackend], Heads], bool]) -> tuple[SDPBackend, ...]:
    """The fused kernels alone if one of them takes these heads; else all.

    Args:
        runs: whether attention with these heads runs on one of some kernels.
    """
    fused = FUSED_WITH_MASK if heads.masked else FUSED
    return fused if runs(fused, heads) else (*fused, SDPBackend.MATH)


def describe_kernels(kernels: Sequence[SDPBackend], heads: Heads) -> str:
    """Kernels of attention, for the log."""
    if SDPBackend.MATH in kernels:
        return ("PyTorch's operations one by one, slow and with T x T scores: no fused kernel "
                f"here takes {heads}")
    return " or ".join(kernel.name.removesuffix("_ATTENTION").lower() for kernel in kernels)


def _runs_on_gpu(kernels: Sequence[SDPBackend], heads: Heads, length: int = 128) -> bool:
    """Forward and backward of one short sequence."""
    def zeros(count: int) -> Tensor:
        return torch.zeros(1, count, length, heads.width, dtype=heads.dtype, device="cuda",
                           requires_grad=True)

    mask = torch.ones(1, 1, length, length, dtype=torch.bool,
                      device="cuda").tril() if heads.masked else None
    try:
        with sdpa_kernel(list(kernels)), torch.enable_grad():
            attend(zeros(heads.queries), zeros(heads.groups), zeros(heads.groups), mask,
                   heads.dropout).sum().backward()
    except RuntimeError:  # no available kernel
        return False
    return True
