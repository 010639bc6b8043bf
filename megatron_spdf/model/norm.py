"""Norms under sequence parallelism, with NVIDIA Apex's fused LayerNorm where it is installed."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class _Shared:
    """Marks the parameters of a norm, of which each rank sees a slice of the tokens: Megatron-Core
    must sum their gradients over the tensor-parallel group. Its own wrapper of PyTorch's norms
    refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(_Shared, nn.LayerNorm):
    """PyTorch's LayerNorm."""


class RMSNorm(_Shared, nn.RMSNorm):
    """PyTorch's RMSNorm."""


def have_apex() -> bool:
    """Whether NVIDIA Apex is importable; the PyPI package called `apex` has no `normalization`."""
    try:
        return (torch.cuda.is_available()
                and importlib.util.find_spec("apex.normalization") is not None)
    except ImportError:
        return False


def norm_class(kind: str, norm: str) -> type[nn.Module]:
    """The class of a model's norms.

    Args:
        kind: the recipe's `kernels.norm`.
        norm: of the architecture.
    """
    if kind == "auto" and norm == "LayerNorm" and have_apex():
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}[norm]
