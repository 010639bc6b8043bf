"""Core attention on PyTorch's scaled_dot_product_attention, the fast path without Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Kernels that store no T x T scores. Of them only the last is known to take any mask.
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
FUSED_WITH_MASK = (SDPBackend.EFFICIENT_ATTENTION,)


def document_mask(documents: Tensor) -> Tensor:
    """Which tokens attend to which: causal, and to their own document only.

    Args:
        documents: (B, T), the number of the document that a token is in.

    Returns:
        (B, 1, T, T) bool, true where query i may attend to key j: SDPA's convention, the opposite of Megatron-Core's.
    """
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril_().unsqueeze(1)


@dataclass(frozen=True)
class Heads:
    """What decides which kernels of a GPU take an attention."""

    queries: int
    groups: int
    width: int
    dtype: torch.dtype
    dropout: float
    masked: bool

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups != self.queries else ""
        return (f"{self.queries} heads of {self.width}{groups}, {str(self.dtype).removeprefix('torch.')}"
                + (", with a mask" if self.masked else ""))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float | None) -> Tensor:
    """softmax(QK^T x scale) V, causal unless there is a mask: (B, nh, T, hs), (B, ng, T, hs) x 2 -> (B, nh, T, hs)."""
    if mask is not None and k.size(1) != q.size(1):  # kernels that take masks take no groups
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale,
                                        enable_gqa=q.size(1) != k.size(1))


def choose_kernels(heads: Heads, runs: Callable[[Sequence[SDPBackend], Heads], bool]) -> tuple[SDPBackend, ...]:
    """The fused kernels if one of them takes these heads, so that PyTorch cannot fall back in silence; else all.

    Args:
        runs: whether attention with these heads runs on one of some kernels.
    """
    fused = FUSED_WITH_MASK if heads.masked else FUSED
    return fused if runs(fused, heads) else (*fused, SDPBackend.MATH)


@lru_cache
def kernels_on_gpu(heads: Heads) -> tuple[SDPBackend, ...]:
    """`choose_kernels`, tried out on this GPU."""
    return choose_kernels(heads, _runs_on_gpu)


def _runs_on_gpu(kernels: Sequence[SDPBackend], heads: Heads, length: int = 128) -> bool:
    def zeros(count: int) -> Tensor:
        return torch.zeros(1, count, length, heads.width, dtype=heads.dtype, device="cuda", requires_grad=True)

    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril() if heads.masked else None
    try:
        with sdpa_kernel(list(kernels)), torch.enable_grad():
            out = attend(zeros(heads.queries), zeros(heads.groups), zeros(heads.groups), mask, heads.dropout, None)
            out.sum().backward()
    except RuntimeError:  # no available kernel
        return False
    return True


def describe_kernels(kernels: Sequence[SDPBackend], heads: Heads) -> str:
    """For the log."""
    if SDPBackend.MATH in kernels:
        return f"PyTorch's own operations, slow and with T x T scores, since no fused kernel here takes {heads}"
    return " or ".join(kernel.name.removesuffix("_ATTENTION").lower() for kernel in kernels)


class SdpaCoreAttention(MegatronModule):
    """Causal softmax(QK^T x scale) V for Megatron-Core's SelfAttention; the scale is 1 / sqrt(d_head) if None."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type, attention_type: str,
                 softmax_scale: float | None = None, **_):
        super().__init__(config)
        self.dropout, self.scale = config.attention_dropout, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_) -> Tensor:
        """(T, B, nh, hs), (T, B, ng, hs), (T, B, ng, hs) -> (T, B, nh * hs), on this rank's heads.

        Args:
            attention_mask: of `document_mask`, or None for plain causal attention, which has faster kernels.
        """
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        # Other heads, other masks.
        draws = tensor_parallel.get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext()
        with draws, self._kernels(q, k, attention_mask is not None):
            out = attend(q, k, v, attention_mask, dropout, self.scale)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _kernels(self, q: Tensor, k: Tensor, masked: bool) -> AbstractContextManager:
        if not q.is_cuda:
            return nullcontext()
        return sdpa_kernel(list(kernels_on_gpu(Heads(q.size(1), k.size(1), q.size(3), q.dtype, self.dropout, masked))))

    def describe(self, masked: bool) -> str:
        """Which kernels compute it on this GPU, for the log."""
        c = self.config
        heads = Heads(c.num_attention_heads // c.tensor_model_parallel_size,
                      c.num_query_groups // c.tensor_model_parallel_size, c.kv_channels, c.params_dtype, self.dropout,
                      masked)
        return describe_kernels(kernels_on_gpu(heads), heads)


def core_attention(kind: str) -> type:
    """The class for `kernels.attention`.

    Raises:
        ValueError: Transformer Engine is asked for and not installed.
    """
    if kind == "sdpa":
        return SdpaCoreAttention
    from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention

    if not HAVE_TE or not torch.cuda.is_available():
        raise ValueError("kernels.attention=transformer_engine, but Transformer Engine or a GPU is missing here; "
                         "use NVIDIA's PyTorch container, which brings it, or kernels.attention=sdpa")
    return TEDotProductAttention
