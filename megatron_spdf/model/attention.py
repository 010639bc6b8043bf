"""Core attention on PyTorch's scaled_dot_product_attention, the fast path without Transformer
Engine."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from megatron_spdf.model.sdpa import Heads, attend, describe_kernels, kernels_on_gpu, on_kernels


class QkvLinear(ColumnParallelLinear):
    """W_QKV, whose bias a GPU adds within the product; Megatron-Core does after it, in a pass of
    its own."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None,
                      **others) -> Tensor:
        alone = not (others["allreduce_dgrad"] or others["sequence_parallel"])
        if alone and input.is_cuda:
            return linear(input, weight, bias)
        return super()._forward_impl(input=input, weight=weight, bias=bias, **others)


def document_mask(documents: Tensor) -> Tensor:
    """Mask of attention: causal, and within a document.

    Args:
        documents: (B, T), the number of the document that a token is in.

    Returns:
        (B, 1, T, T) bool, true where query i may attend to key j: SDPA's convention, the opposite
        of Megatron-Core's.
    """
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril_().unsqueeze(1)


class SdpaCoreAttention(MegatronModule):
    """Causal softmax(QK^T x scale) V for Megatron-Core's SelfAttention; the scale is 1 /
    sqrt(d_head) if None."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type,
                 attention_type: str, softmax_scale: float | None = None, **_):
        super().__init__(config)
        self.dropout, self.scale = config.attention_dropout, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                **_) -> Tensor:
        """(T, B, nh, hs), (T, B, ng, hs), (T, B, ng, hs) -> (T, B, nh * hs), on this rank's heads.

        Args:
            attention_mask: of `document_mask`, or None for plain causal attention, which has faster
                kernels.
        """
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        other_heads_other_masks = (
            tensor_parallel.get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext()
        )
        with other_heads_other_masks, on_kernels(q, k, attention_mask is not None, self.dropout):
            out = attend(q, k, v, attention_mask, dropout, self.scale)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def describe(self, masked: bool) -> str:
        """Kernels that compute it on this GPU, for the log."""
        c, ranks = self.config, self.config.tensor_model_parallel_size
        heads = Heads(c.num_attention_heads // ranks, max(1, c.num_query_groups // ranks),
                      c.kv_channels, c.params_dtype, self.dropout, masked)
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
        raise ValueError("kernels.attention=transformer_engine, but Transformer Engine or a GPU is "
                         "missing here; use NVIDIA's PyTorch container, which brings it, or "
                         "kernels.attention=sdpa")
    return TEDotProductAttention
