"""Tensors that say that they are on a GPU, and compute on the CPU: for what is done on a GPU alone.

A product and what is added within it are rounded once, as by a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


class OnGpu(Tensor):
    """Numbers of the CPU; so are those that are computed with them."""

    @property
    def is_cuda(self) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.addmm:
            return _added(*args, **kwargs or {})
        if function is linear:
            x, weight, bias = args
            return _added(bias, x, weight.t())
        return super().__torch_function__(function, types, args, kwargs or {})


def on_gpu(x: Tensor) -> Tensor:
    """The same numbers, in the same memory."""
    return x.as_subclass(OnGpu)


def _added(bias: Tensor, x: Tensor, y: Tensor, out_dtype: torch.dtype | None = None,
           out: Tensor | None = None) -> Tensor:
    bias_, x_, y_ = (t.as_subclass(Tensor).double() for t in (bias, x, y))
    found = (bias_ + x_ @ y_).to(out_dtype or x.dtype)
    return on_gpu(found if out is None else out.copy_(found))
