"""LayerNorm under sequence parallelism, with NVIDIA Apex's fused kernel where it is installed."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm(torch.nn.LayerNorm):
    """PyTorch's LayerNorm; Megatron-Core's own wrapper of it refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            # Each rank sees a slice of the tokens, so Megatron-Core must sum this gradient over the
            # group.
            parameter.sequence_parallel = config.sequence_parallel


def have_apex() -> bool:
    """Whether NVIDIA Apex is importable; the PyPI package called `apex` has no `normalization`."""
    try:
        return (
            torch.cuda.is_available() and importlib.util.find_spec("apex.normalization") is not None
        )
    except ImportError:
        return False


def norm_class(kind: str) -> type:
    """The class for `kernels.norm`."""
    if kind == "auto" and have_apex():
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return Norm
