"""Softmax over the vocabulary: the choice of kernels."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.mask import DTYPES


def softmax_kernels(device: str, dtype: torch.dtype) -> ModuleType | None:
    """Module with the kernels for logits of a dtype; None: PyTorch's operations one by one.

    Args:
        device: cpu or cuda.
    """
    return _tried_on_gpu() if device == "cuda" and dtype in DTYPES else None


def describe_softmax(device: str, dtype: torch.dtype) -> str:
    """Says what computes it for logits of a dtype on a type of device, for the log."""
    kernels = softmax_kernels(device, dtype)
    return "torch" if kernels is None else kernels.NAME


@cache
def _tried_on_gpu() -> ModuleType | None:
    """The kernels, if they work here."""
    return dispatch.try_kernels("triton_softmax", _self_test,
                                "the loss runs one operation after the other")


def _self_test(module: ModuleType, device: torch.device) -> None:
    """Raises if sums or gradient of two tokens, of three columns and one that pads, are not those
    of PyTorch."""
    logits = torch.tensor([[0.0, 1.0, 3.0, 9.0], [2.0, 0.0, 1.0, 9.0]], device=device)
    labels, shares = torch.tensor([2, -1], device=device), torch.tensor([0.5, 1.0], device=device)
    real = logits[:, :3]
    wanted = torch.stack([real.amax(1), (real - real.amax(1, True)).exp().sum(1),
                          torch.tensor([3.0, 0.0], device=device), real.sum(1)])
    target = torch.tensor([[0.1, 0.1, 0.8], [0.1, 0.1, 0.1]], device=device)
    gradient = (real.softmax(1) - target) * shares[:, None]
    found = module.sums(logits, labels, 3, True)
    module.gradient_(logits, labels, found[0], found[1], shares, 3, 3, 0.3)
    if not (torch.allclose(found, wanted, rtol=1e-5) and not logits[:, 3].any()
            and torch.allclose(logits[:, :3], gradient, rtol=1e-5, atol=1e-6)):
        raise RuntimeError("it computes something else than PyTorch")
