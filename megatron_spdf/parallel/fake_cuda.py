"""Stand-ins for the CUDA calls that Megatron-Core and DeepSpeed make, on machines without a GPU.

Ranks then train over gloo with tensors on the CPU. In a dry run the meta device, which has shapes
and no memory, takes the CPU's place. On a machine with a GPU `install` does nothing. Every stand-in
has a test in tests/parallel/test_fake_cuda.py.
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
    """Mode of PyTorch that changes two kinds of calls while it is entered.

    - `device="cuda"` in any call, such as `torch.empty` or `Tensor.to`: replaced by `device`.
    - `Tensor.type()`: answered with the name of the CUDA type, such as `torch.cuda.FloatTensor`,
      since Megatron-Core's optimizers sort parameters by these names.

    Args:
        device: that takes the GPU's place.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Calls `func`, with device or answer changed."""
        if kwargs:
            if "cuda" in str(kwargs.get("device", "")):
                kwargs["device"] = self.device
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1:
            return f"torch.cuda.{func(*args).rpartition('.')[2]}"
        return func(*args)


_mode: FakeCuda | None = None


def install(device: torch.device = CPU) -> bool:
    """Installs the stand-ins for the rest of the process, before megatron.core is imported.

    Args:
        device: that takes the GPU's place.

    Returns:
        True if this machine has no usable GPU, and so needs them.
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
        _patch_torch(device)
        _patch_megatron()
    return True


def _patch_torch(device: torch.device) -> None:
    """Replaces functions of `torch.cuda`, and methods that move to a GPU."""
    # The device that factory calls are given where no "cuda" is spelled out.
    torch.cuda.current_device = lambda: device
    # Work on the CPU is done when its call returns, so there is nothing to wait for.
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_stream = lambda *_, **__: None
    # The CPU's random state serves as the GPU's.
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # Tensors and modules are on their device already.
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self


def _patch_megatron() -> None:
    """Lets Megatron-Core's random states of tensor-parallel ranks switch the CPU's state."""
    with without_torch_compile():
        import megatron.core.tensor_parallel.random as megatron_random

    # In every dropout it warns that the CPU's state changed, which is the purpose here.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


@contextmanager
def without_torch_compile() -> Iterator[None]:
    """Makes `torch.compile` return functions unchanged, for imports that use it as a decorator.

    These are Megatron-Core's fusions and DeepSpeed's Muon, none of which runs here. Importing the
    compiler would be a third of the time that a rank takes to start.
    """
    with patch.object(torch, "compile", _identity):
        yield


def _identity(function=None, **_):
    """Stand-in for `torch.compile`, as a function, or as a decorator with or without arguments."""
    return function or _identity
