"""Between a compact vector and the dense weight it stands for.

One interface over implementations: Triton on CUDA, PyTorch on CUDA where Triton does not work,
PyTorch on CPU. Which it is follows from the device, is settled at the first use on it, and
`describe` tells it to the log. What an implementation does not take goes to PyTorch, which takes
everything.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_spdf.kernels import torch_reference
from megatron_spdf.kernels.mask import SPAN, Mask
from megatron_spdf.text import first_line

logger = logging.getLogger(__name__)
DENSE = "expanded and multiplied as dense weights"


@cache
def implementation(device: str) -> tuple[ModuleType, str]:
    """What expands and compresses on a type of device, and its name for the log.

    Args:
        device: cpu or cuda.
    """
    if device != "cuda":
        return torch_reference, "torch"
    try:
        from megatron_spdf.kernels import triton_compact

        _self_test(triton_compact, torch.device(device))
        return triton_compact, triton_compact.NAME
    except Exception as error:  # whatever a compiler, a driver or a GPU it does not know may raise
        return (
            torch_reference,
            f"torch, since triton does not work here ({type(error).__name__}: {first_line(error)})",
        )


def adds_gradients(device: str) -> bool:
    """Whether gradients of compact weights are added to their fp32 buffers where they come about:
    not by PyTorch, which would make them first, and leaves adding to the engine."""
    return implementation(device)[0] is not torch_reference


def make_index(bits: Tensor, slice_shape: tuple[int, int], axis: int) -> Tensor:
    """What the implementation for the device of the bits wants to know of them, once; see
    `mask.Mask`.

    The meta device stands for a GPU that is not there.
    """
    if bits.is_meta:
        return bits.new_empty((len(bits), -(-bits.shape[1] // (SPAN // 8))), dtype=torch.int32)
    return implementation(bits.device.type)[0].make_index(bits, slice_shape, axis)


def expand(values: Tensor, mask: Mask) -> Tensor:
    """The dense weight (out, in): active values, (slices, active per slice), at their positions,
    zero elsewhere."""
    return values.new_empty(mask.shape) if values.is_meta else _for(mask,
                                                                    values).expand(values, mask)


def compress(dense: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
    """The entries of a dense weight, or of its gradient, at the active positions: (slices, active
    per slice).

    Args:
        out: contiguous, of the same size; what they are added to, in place, in its own precision.
    """
    if dense.is_meta:
        return dense.new_empty(mask.slices, mask.active)
    return _for(mask, dense, *([] if out is None else [out])).compress(dense, mask, out)


def _for(mask: Mask, *tensors: Tensor) -> ModuleType:
    chosen, _ = implementation(tensors[0].device.type)
    if chosen is torch_reference or chosen.supports(mask, *tensors):
        return chosen
    say_once(f"a weight {mask.shape[0]} x {mask.shape[1]} of {tensors[0].dtype} is not for the "
              f"kernels of {chosen.__name__.rpartition('.')[2]}; PyTorch expands and compresses it")
    return torch_reference


@cache
def say_once(text: str) -> None:
    logger.warning(text)


def _self_test(module: ModuleType, device: torch.device) -> None:
    """Raises where a kernel of the module does not compute what PyTorch does."""
    bits = torch.tensor([[0b10110001]], dtype=torch.uint8, device=device)
    mask = Mask(bits, module.make_index(bits, (2, 4), 0), (2, 4), (2, 4), 0, 4)
    values = torch.arange(1.0, 5.0, device=device).view(1, 4)
    dense = module.expand(values, mask)
    if not (torch.equal(dense, torch_reference.expand(values, mask))
            and torch.equal(module.compress(dense, mask, values.clone()), 2 * values)):
        raise RuntimeError("it computes something else than PyTorch")


def describe(device: str) -> str:
    """Which implementation expands and compresses on a type of device, for the log."""
    return implementation(device)[1]
