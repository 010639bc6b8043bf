"""Stand-ins for the CUDA calls that Megatron-Core and DeepSpeed make, on machines without a GPU.

Ranks then train over gloo with tensors on the CPU. In a dry run the meta device, which has shapes
and no memory, takes the CPU's place. On a machine with a GPU `install` does nothing. Every stand-in
has a test in tests/parallel/test_fake_cuda.py.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.jit._builtins import _find_builtin, _register_builtin

CPU = torch.device("cpu")
# What takes a device by keyword: functions of `torch` and methods of tensors. They are replaced one
# by one, since a mode of PyTorch that sees every call would be a tenth of the time of a small step.
FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace",
             "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like",
             "randperm", "tensor", "zeros", "zeros_like")
METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to")

_installed = False


def install(device: torch.device = CPU) -> bool:
    """Installs the stand-ins for the rest of the process, before megatron.core is imported.

    Args:
        device: that takes the GPU's place.

    Returns:
        True if this machine has no usable GPU, and so needs them.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        assert "megatron.core" not in sys.modules, (
            "install the stand-in before importing megatron.core"
        )
        _patch_factories(device)
        _patch_torch(device)
        _patch_megatron()
        _installed = True
    return True


def _patch_factories(device: torch.device) -> None:
    """Replaces "cuda" by `device` where a tensor is made or moved."""
    # With the first device that is a context PyTorch notes its factories, which are still its own.
    with torch.device(device):
        torch.empty(0)
    for name in METHODS:
        setattr(torch.Tensor, name, _never_on_cuda(getattr(torch.Tensor, name), device))
    for name in FACTORIES:
        replaced = getattr(torch, name)
        setattr(torch, name, _never_on_cuda(replaced, device))
        if operator := _find_builtin(replaced):
            # TorchScript knows operators by the functions that they are
            _register_builtin(getattr(torch, name), operator)


def _never_on_cuda(function: Callable, device: torch.device) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = device
        return function(*args, **kwargs)
    return call


def _patch_torch(device: torch.device) -> None:
    """Replaces functions of `torch.cuda`, methods that move to a GPU, and `Tensor.type`."""
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
    # Megatron-Core's optimizers sort parameters by the names of their CUDA types.
    torch.Tensor.type = _named_as_on_cuda(torch.Tensor.type)


def _named_as_on_cuda(function: Callable) -> Callable:
    """`Tensor.type`, which says torch.cuda.FloatTensor for torch.FloatTensor, or converts."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        return f"torch.cuda.{found.rpartition('.')[2]}" if isinstance(found, str) else found
    return call


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
