"""A stand-in for the CUDA calls Megatron-Core makes, for machines without a GPU (gloo, CPU
tensors).

What it stands in for, each with a test: `device="cuda"` in factory calls, `Tensor.cuda` and
`Module.cuda`, `Tensor.type()` (Megatron-Core's optimizers look for the CUDA names),
`torch.cuda.current_device`, `synchronize`, `current_stream`, the CUDA random state, which becomes
the CPU's, and the compilation of Megatron-Core's fusions and DeepSpeed's Muon. On a machine with a
GPU `install` does nothing. A dry run lets the meta device, which has shapes and no memory, stand in
instead.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class FakeCuda(TorchFunctionMode):
    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            if "cuda" in str(kwargs.get("device", "")):
                kwargs["device"] = self.device
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return f"torch.cuda.{func(*args).rpartition('.')[2]}"
        return func(*args)


_mode: FakeCuda | None = None


def install(device: torch.device = CPU) -> bool:
    """Installs the stand-in for the rest of the process; must run before megatron.core is imported.

    Args:
        device: that stands in for the GPU.

    Returns:
        Whether this machine needs it, that is, has no usable GPU.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        assert "megatron.core" not in sys.modules, (
            "install the stand-in before importing megatron.core"
        )
        _mode = FakeCuda(device)
        _mode.__enter__()
        _stand_in(device)
    return True


def _stand_in(device: torch.device) -> None:
    torch.cuda.current_device = lambda: device
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_stream = lambda *_, **__: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self

    with without_torch_compile():
        import megatron.core.tensor_parallel.random as megatron_random

    # It warns, in every dropout, where the CPU's state changed; here that is the state.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


@contextmanager
def without_torch_compile() -> Iterator[None]:
    """Imports within leave alone what they decorate with torch.compile: Megatron-Core's fusions,
    DeepSpeed's Muon. None runs here, and the import of the compiler is a third of the time a rank
    takes to start."""
    with patch.object(torch, "compile", _leave_as_it_is):
        yield


def _leave_as_it_is(function=None, **_):
    return function or _leave_as_it_is
