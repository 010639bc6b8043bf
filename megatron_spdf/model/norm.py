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
        return self.on_kernels(x, kernels)

    def on_kernels(self, x: Tensor, kernels: ModuleType) -> Tensor | tuple[Tensor, Tensor]:
        """(..., H) -> (..., H)."""
        return _LayerNorm.apply(x, self.weight, self.bias, self.eps, kernels)[0]


class ResidualLayerNorm(LayerNorm):
    """LayerNorm at the beginning of a residual branch. On GPUs it gives its input beside its
    output: as the residual, whose gradient its backward adds in the same pass."""

    def on_kernels(self, x: Tensor, kernels: ModuleType) -> tuple[Tensor, Tensor]:
        """(..., H) -> (..., H) twice."""
        return _LayerNorm.apply(x, self.weight, self.bias, self.eps, kernels)


class _LayerNorm(torch.autograd.Function):
    """LayerNorm over the last axis, and its input."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
                kernels: ModuleType) -> tuple[Tensor, Tensor]:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)  # of a residual that nobody uses there is none
        ctx.kernels = kernels
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor | None, of_residual: Tensor | None,
                 ) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return of_residual, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.kernels.layer_norm_backward(
            gradient.flatten(0, -2), x.flatten(0, -2), weight, mean.flatten(), rstd.flatten(),
            None if of_residual is None else of_residual.flatten(0, -2))
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


def residual_norm_class(norm: type[nn.Module]) -> type[nn.Module]:
    """The class of the norms at the beginning of a layer's residual branches.

    Args:
        norm: the class of the model's other norms.
    """
    # Megatron-Core's layers take a residual from a norm since they have this key, in 0.19.
    takes_residual = "fused_residual_rmsnorm" in TransformerConfig.__dataclass_fields__
    return ResidualLayerNorm if norm is LayerNorm and takes_residual else norm
