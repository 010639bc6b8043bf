"""Norms under sequence parallelism, with NVIDIA Apex's fused LayerNorm where it is installed."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_spdf.kernels.norm import norm_kernels


class _Shared:
    """Marks the parameters of a norm, of which each rank sees a slice of the tokens: Megatron-Core
    must sum their gradients over the tensor-parallel group. Its own wrapper of PyTorch's norms
    refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(_Shared, nn.LayerNorm):
    """PyTorch's LayerNorm, on GPUs with a backward of one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        kernels = norm_kernels(x)
        if kernels is None:
            return super().forward(x)
        return _LayerNorm.apply(x, self.weight, self.bias, self.eps, kernels)


class _LayerNorm(torch.autograd.Function):
    """LayerNorm over the last axis."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
                kernels: ModuleType) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.kernels.layer_norm_backward(
            gradient.flatten(0, -2), x.flatten(0, -2), weight, mean.flatten(), rstd.flatten())
        return of_x.view(x.shape), of_weight, of_bias, None, None


class RMSNorm(_Shared, nn.RMSNorm):
    """PyTorch's RMSNorm."""


def have_apex() -> bool:
    """True if NVIDIA Apex is importable; the PyPI package called `apex` has no `normalization`."""
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
