"""Selection of the largest or lowest entries of each row, as packed bits: the choice of kernels.

Shapes: (S, E) entries of S rows, ties by position; packed bits are (S, ceil(E / 8)) uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.limits import LARGEST_SELECTION

MAGNITUDES = (torch.bfloat16, torch.float16, torch.float32)  # among which the largest are selected
SCORES = (torch.float32, torch.int64)  # among which the lowest are selected


def largest_kernels(values: Tensor) -> ModuleType | None:
    """Module that selects the largest magnitudes of rows (S, E); None: PyTorch does."""
    return _kernels(values, MAGNITUDES)


def lowest_kernels(scores: Tensor) -> ModuleType | None:
    """Module that selects the lowest scores of rows (S, E); None: PyTorch does."""
    return _kernels(scores, SCORES)


def _kernels(x: Tensor, dtypes: Sequence[torch.dtype]) -> ModuleType | None:
    fits = x.is_cuda and x.dtype in dtypes and x.shape[-1] <= LARGEST_SELECTION
    return _tried_on_gpu() if fits else None


@cache
def _tried_on_gpu() -> ModuleType | None:
    """The kernels, if they work here."""
    return dispatch.try_kernels("triton_selection", _self_test,
                                "masks are chosen by sorting, which takes many times as long")


def _self_test(module: ModuleType, device: torch.device) -> None:
    """Raises if the three largest magnitudes, or lowest scores, of ten are not the right ones."""
    values = torch.tensor([[1.0, -5, 2, 5, 0, -5, 3, 5, -0.0, 1]], device=device)
    bits, more = (torch.zeros(1, 2, dtype=torch.uint8, device=device) for _ in range(2))
    found = int(module.fill_largest(values, [(3, bits), (5, more)])), bits.tolist(), more.tolist()
    largest = 3, [[0b01010100, 0]], [[0b01010111, 0]]
    lowest = module.lowest_bits(values, 3).tolist(), module.lowest_bits(values.long(), 3).tolist()
    if found != largest or lowest != ([[0b01001100, 0]], [[0b01001100, 0]]):
        raise RuntimeError("it computes something else than PyTorch")
