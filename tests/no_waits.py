"""Refuses what makes the host of a GPU wait, on a CPU: a number that comes to the host, and a
tensor whose size is that of what is found."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal",
         "repeat_interleave")


class NoWaits(TorchDispatchMode):
    """Counts what is executed, by name, and raises at what waits.

    Attributes:
        calls: of each operation.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in arguments[1])
        if name in WAITS or by_mask:
            raise AssertionError(f"{name} makes the host wait")
        return function(*arguments, **(keywords or {}))


def as_kernel(function):
    """The function, as a kernel that the mode does not look into."""
    def launched(*arguments):
        with _disable_current_modes():
            return function(*arguments)
    return launched
