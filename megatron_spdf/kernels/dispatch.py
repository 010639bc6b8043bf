"""Expand and compress: between the active values of a weight and the dense weight.

One interface over three backends: Triton on CUDA, PyTorch on CUDA if Triton does not work, and
PyTorch on CPU. The type of the device determines the backend, which is compared with PyTorch once,
at its first use. Weights that Triton's kernels do not support go to PyTorch, which supports all.

Shapes: W (out, in) is the dense weight of this rank; `values` are (slices, active per slice).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from megatron_spdf.kernels import torch_reference
from megatron_spdf.kernels.mask import SPAN, Mask
from megatron_spdf.text import first_line

logger = logging.getLogger(__name__)
DENSE = "expanded and multiplied as dense weights"  # for the log, where there is no kernel


@cache
def backend_for(device: str) -> tuple[ModuleType, str]:
    """Module that expands and compresses on a type of device, and its name for the log.

    Args:
        device: cpu or cuda.
    """
    if device != "cuda":
        return torch_reference, "torch"
    try:
        from megatron_spdf.kernels import triton_compact

        _self_test(triton_compact, torch.device(device))
        return triton_compact, triton_compact.NAME
    # A compiler, a driver or a new GPU may raise anything.
    except Exception as error:
        return torch_reference, (f"torch, since triton does not work here "
                                 f"({type(error).__name__}: {first_line(error)})")


def backend_name(device: str) -> str:
    """Name of the backend for a type of device, for the log."""
    return backend_for(device)[1]


def adds_gradients(device: str) -> bool:
    """True if the backend adds a compact gradient directly to its fp32 buffer.

    PyTorch would first allocate the gradient, so with it the engine does the addition.
    """
    return backend_for(device)[0] is not torch_reference


def make_index(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """Derives the index of a mask, `mask.Mask.index`, for the backend of its device.

    On the meta device, shapes are those of the GPU kernels.

    Args:
        bits: (slices, ceil(entries per slice / 8)) uint8.
        slice_shape: (out, in) of a slice.
        axis: along which slices lie beside one another.
    """
    if bits.is_meta:
        return bits.new_empty((len(bits), -(-bits.shape[1] // (SPAN // 8))), dtype=torch.int32)
    return backend_for(bits.device.type)[0].make_index(bits, slice_shape, axis)


def expand(values: Tensor, mask: Mask) -> Tensor:
    """Dense weight (out, in): active values at their positions, zero elsewhere.

    Args:
        values: (slices, active per slice).
    """
    if values.is_meta:
        return values.new_empty(mask.shape)
    return _backend_of(mask, values).expand(values, mask)


def compress(dense: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
    """Active entries of a dense weight, or of its gradient: (slices, active per slice).

    Args:
        dense: (out, in).
        out: (slices, active per slice), contiguous; the entries are added to it in place, in its
            own precision.
    """
    if dense.is_meta:
        return dense.new_empty(mask.slices, mask.active)
    return _backend_of(mask, dense, *([] if out is None else [out])).compress(dense, mask, out)


def _backend_of(mask: Mask, *tensors: Tensor) -> ModuleType:
    """Backend for a mask and tensors of these dtypes."""
    backend, _ = backend_for(tensors[0].device.type)
    if backend is torch_reference or backend.supports(mask, *tensors):
        return backend
    warn_once(f"a weight {mask.shape[0]} x {mask.shape[1]} of {tensors[0].dtype} is not for the "
              f"kernels of {backend.__name__.rpartition('.')[2]}; PyTorch expands and compresses "
              "it")
    return torch_reference


@cache
def warn_once(text: str) -> None:
    """Logs a warning, the first time only."""
    logger.warning(text)


def try_kernels(name: str, test: Callable[[ModuleType, torch.device], None],
                otherwise: str) -> ModuleType | None:
    """Returns a module of this room, if its kernels work on the GPU here.

    Args:
        name: of the module.
        test: raises if they compute something else than PyTorch.
        otherwise: what is so without them, for a warning.
    """
    try:
        module = import_module(f"megatron_spdf.kernels.{name}")
        test(module, torch.device("cuda"))
        return module
    except Exception as error:  # whatever a compiler, a driver or a GPU it does not know may raise
        warn_once(f"{otherwise}, since triton does not work here ({type(error).__name__}: "
                  f"{first_line(error)})")
        return None


def _self_test(module: ModuleType, device: torch.device) -> None:
    """Raises if a kernel of the module disagrees with PyTorch, on a slice of one byte."""
    bits = torch.tensor([[0b10110001]], dtype=torch.uint8, device=device)
    mask = Mask(bits, module.make_index(bits, (2, 4), 0), (2, 4), (2, 4), 0, 4)
    values = torch.arange(1.0, 5.0, device=device).view(1, 4)
    dense = module.expand(values, mask)
    # Compress is given the values as its buffer, so that it must double them.
    if not (torch.equal(dense, torch_reference.expand(values, mask))
            and torch.equal(module.compress(dense, mask, values.clone()), 2 * values)):
        raise RuntimeError("it computes something else than PyTorch")
