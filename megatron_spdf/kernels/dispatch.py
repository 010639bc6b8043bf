"""Between a compact vector and the dense weight it stands for, and products with weights of tiles
and 2:4 ones.

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

from megatron_spdf.kernels import torch_reference, two_four
from megatron_spdf.kernels.limits import LARGEST, SMALLEST
from megatron_spdf.kernels.mask import SPAN, Mask, TileTable, TwoFour, find_tiles, multiplies_tiles
from megatron_spdf.text import first_line

__all__ = ["TileTable", "Mask", "TwoFour", "adds_gradients", "tile_products", "compress",
           "describe", "expand",
           "find_tiles", "implementation", "make_index", "multiplies_tiles", "two_four_library",
           "two_four_products"]

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


@cache
def tile_products(device: str, size: int, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """What multiplies with weights of tiles without expanding them, None where nothing does; and
    its name, or why.

    Args:
        device: as of `implementation`.
        size: of a tile.
    """
    chosen, name = implementation(device)
    if chosen is torch_reference:
        return None, DENSE
    if not multiplies_tiles(size, dtype):
        return None, (f"{DENSE}, since the kernels take tiles of {SMALLEST} to {LARGEST} in powers "
                      f"of two, of 16 or 32 bits, not {size} of {dtype}")
    try:
        from megatron_spdf.kernels import triton_tiles

        _self_test_tiles(triton_tiles, chosen, torch.device(device), size, dtype)
        return triton_tiles, name
    except Exception as error:  # whatever a compiler, a driver or a GPU it does not know may raise
        return (
            None,
            f"{DENSE}, since triton's products do not work here ({type(error).__name__}: "
            f"{first_line(error)})",
        )


@cache
def two_four_products(device: str, dtype: torch.dtype) -> tuple[two_four.Library | None, str]:
    """What multiplies with 2:4 weights on sparse tensor cores, None where nothing does; and its
    name, or why.

    Args:
        device: as of `implementation`.
    """
    if device != "cuda":
        return None, DENSE
    if dtype not in two_four.DTYPES:
        return None, f"{DENSE}, since sparse tensor cores are for 16 bits here, not {dtype}"
    said = []
    for library in two_four.LIBRARIES:
        try:
            two_four.try_out(library, torch.device(device), dtype)
            return library, library.NAME
        except (
            Exception
        ) as error:  # whatever a library, a driver or a GPU it does not know may raise
            said.append(
                f"{library.NAME} does not work here ({type(error).__name__}: {first_line(error)})"
            )
    return None, f"{DENSE}, since {' and '.join(said)}"


def two_four_library(dense: Tensor) -> two_four.Library | None:
    """What multiplies with a 2:4 weight that stands for this dense one, None where it is
    expanded."""
    library, _ = two_four_products(dense.device.type, dense.dtype)
    if library is None or two_four.fits(dense.shape):
        return library
    _say_once(f"a 2:4 weight {dense.shape[0]} x {dense.shape[1]} is {DENSE}: {library.NAME} is "
              f"asked for multiples of {two_four.SIDE} along both axes only")
    return None


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
    _say_once(f"a weight {mask.shape[0]} x {mask.shape[1]} of {tensors[0].dtype} is not for the "
              f"kernels of {chosen.__name__.rpartition('.')[2]}; PyTorch expands and compresses it")
    return torch_reference


@cache
def _say_once(text: str) -> None:
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


def _self_test_tiles(module: ModuleType, moves: ModuleType, device: torch.device, size: int,
                     dtype: torch.dtype) -> None:
    """Raises where products with tiles are not those with the expanded weight. Small whole numbers,
    so that both are exact in any order of the sums.

    Args:
        moves: what expands and compresses on the device.
    """
    shape = 2 * size, 2 * size
    active = (
        torch.eye(2, dtype=torch.uint8)
        .fliplr()
        .repeat_interleave(size, 0)
        .repeat_interleave(size // 8, 1)
        * 255
    )
    bits = active.view(1, -1).to(device)
    mask = Mask(bits, moves.make_index(bits, shape, 0), shape, shape, 0, 2 * size * size,
                find_tiles(bits, shape, 0, size))
    draw = torch.Generator().manual_seed(0)
    x, gradient = torch.randint(-1, 2, (2, 24, 2 * size), generator=draw).to(device, dtype)
    values = torch.randint(1, 3, (1, mask.active), generator=draw).to(device, dtype)
    dense = moves.expand(values, mask)
    buffer = torch.ones(values.shape, device=device)
    wanted = 1 + moves.compress((gradient.T @ x).float(), mask)
    if not (torch.equal(module.forward(x, values, mask), x @ dense.T)
            and torch.equal(module.input_gradient(gradient, values, mask), gradient @ dense)
            and torch.equal(module.weight_gradient(gradient, x, mask, buffer), wanted)):
        raise RuntimeError("they are something else than those with the expanded weight")


def describe(device: str) -> str:
    """Which implementation expands and compresses on a type of device, for the log."""
    return implementation(device)[1]
