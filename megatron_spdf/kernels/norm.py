"""Backward of LayerNorm: the choice of kernels."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.limits import LARGEST_NORM
from megatron_spdf.kernels.mask import DTYPES


def norm_kernels(x: Tensor) -> ModuleType | None:
    """Module with the kernel for an input (..., H) of a LayerNorm; None: PyTorch's own backward."""
    if not x.is_cuda or x.dtype not in DTYPES or x.shape[-1] > LARGEST_NORM:
        return None
    return _tried_on_gpu()


@cache
def _tried_on_gpu() -> ModuleType | None:
    """The kernel, if it works here."""
    return dispatch.try_kernels("triton_norm", _self_test,
                                "the backward of LayerNorm is PyTorch's, in two passes")


def _self_test(module: ModuleType, device: torch.device) -> None:
    """Raises if the gradients of three tokens are not PyTorch's."""
    x, gradient = (torch.tensor(numbers, device=device).view(3, 4)
                   for numbers in ([0.0, 1, 2, 5, 3, 1, 4, 1, 5, 9, 2, 6],
                                   [2.0, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]))
    weight, bias = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, 1]], device=device)
    y, mean, rstd = torch.native_layer_norm(x, (4,), weight, bias, 1e-5)
    wanted = torch.ops.aten.native_layer_norm_backward(gradient, x, (4,), mean, rstd, weight, bias,
                                                       (True, True, True))
    found = module.layer_norm_backward(gradient, x, weight, mean.view(-1), rstd.view(-1))
    if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-5)
               for pair in zip(found, wanted, strict=True)):
        raise RuntimeError("it computes something else than PyTorch")
