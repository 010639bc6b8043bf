"""For which tensors there are kernels of one pass, on a GPU that has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from on_gpu import on_gpu

from megatron_spdf.kernels import dispatch, norm, softmax
from megatron_spdf.kernels.limits import LARGEST_NORM

KERNELS = object()
each_dtype = pytest.mark.parametrize(("dtype", "taken"), [
    (torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.float64, False)])


@pytest.fixture(autouse=True)
def works(monkeypatch):
    for module in (norm, softmax):
        monkeypatch.setattr(module, "_tried_on_gpu", lambda: KERNELS)


@each_dtype
def test_they_take_precisions_of_a_run_on_a_gpu_alone(dtype, taken):
    x = torch.zeros(2, 3, 4, dtype=dtype)
    assert (norm.norm_kernels(on_gpu(x)) is KERNELS) == taken
    assert (softmax.softmax_kernels("cuda", dtype) is KERNELS) == taken
    assert norm.norm_kernels(x) is softmax.softmax_kernels("cpu", dtype) is None


@pytest.mark.parametrize(("width", "taken"), [(LARGEST_NORM, True), (LARGEST_NORM + 1, False)])
def test_a_norm_is_no_wider_than_the_registers_of_a_program(width, taken):
    assert (norm.norm_kernels(on_gpu(torch.zeros(1, width))) is KERNELS) == taken


@pytest.mark.parametrize("takes", [True, False])
def test_kernels_are_asked_about_every_tensor_that_they_would_touch(monkeypatch, takes):
    """The buffer of gradients among them, which may have another precision; else PyTorch does
    it."""
    asked, done = [], []

    def kernels(name: str, supports: bool) -> SimpleNamespace:
        return SimpleNamespace(
            __name__=f"room.{name}",
            supports=lambda mask, *tensors: asked.append(tensors) or supports,
            expand=lambda values, mask: done.append(name) or values,
            compress=lambda dense, mask, out: done.append(name) or out)
    own = kernels("own", takes)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: (own, "own"))
    monkeypatch.setattr(dispatch, "torch_reference", kernels("torch", True))
    monkeypatch.setattr(dispatch, "warn_once", lambda text: None)
    values, dense, out = (torch.ones(2) for _ in range(3))
    mask = SimpleNamespace(shape=(1, 2))
    assert dispatch.expand(values, mask) is values
    assert dispatch.compress(dense, mask) is None and dispatch.compress(dense, mask, out) is out
    assert [[id(t) for t in tensors] for tensors in asked] == [
        [id(values)], [id(dense)], [id(dense), id(out)]]
    assert done == ["own" if takes else "torch"] * 3
