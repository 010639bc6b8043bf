"""Triton's backward of LayerNorm against float64."""

from __future__ import annotations

import pytest
import torch
from small_masks import DEVICE, NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)
from megatron_spdf.kernels import norm, triton_norm  # noqa: E402
from megatron_spdf.kernels.program_shapes import NormShape  # noqa: E402
from megatron_spdf.model.norm import _LayerNorm  # noqa: E402

pytestmark = pytest.mark.slow  # in Triton's interpreter


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Of which each has several tokens, and one fewer than others."""
    monkeypatch.setattr(triton_norm, "NORM", NormShape(4, 16))


def test_trial_accepts_the_kernel_and_nothing_that_computes_otherwise(monkeypatch):
    norm._self_test(triton_norm, torch.device(DEVICE))
    right = triton_norm.layer_norm_backward
    monkeypatch.setattr(triton_norm, "layer_norm_backward",
                        lambda *arguments: [1.01 * t for t in right(*arguments)])
    with pytest.raises(RuntimeError, match="something else than PyTorch"):
        norm._self_test(triton_norm, torch.device(DEVICE))


@pytest.mark.parametrize(("dtype", "precision"),
                         [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 48), (1, 2, 64)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_output_and_gradients_are_those_of_float64(dtype, precision, shape, residual):
    draw = torch.Generator().manual_seed(0)
    numbers = [torch.randn(size, generator=draw).to(DEVICE, dtype)
               for size in (shape, shape[-1:], shape[-1:], shape)]
    *operands, gradient = numbers
    operands = [t.requires_grad_() for t in operands]
    y, same = _LayerNorm.apply(*operands, 1e-5, triton_norm)
    assert torch.equal(same, operands[0])
    torch.autograd.backward([y, 3 * same] if residual else [y], [gradient] * (1 + residual))
    exact = [t.detach().double().requires_grad_() for t in operands]
    wanted = torch.nn.functional.layer_norm(exact[0], shape[-1:], *exact[1:], 1e-5)
    torch.autograd.backward([wanted, 3 * exact[0]] if residual else [wanted],
                            [gradient.double()] * (1 + residual))
    for found, of in zip((y, *(t.grad for t in operands)), (wanted, *(t.grad for t in exact)),
                         strict=True):
        assert float((found.double() - of).norm() / of.norm()) < precision
