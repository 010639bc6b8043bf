"""Which class a model's norms have, and that one with a backward of its own is a LayerNorm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_spdf.model import norm


@pytest.mark.parametrize(("kind", "of", "apex", "expected"), [
    ("auto", "LayerNorm", False, "LayerNorm"), ("auto", "RMSNorm", False, "RMSNorm"),
    ("auto", "LayerNorm", True, "FusedLayerNorm"), ("auto", "RMSNorm", True, "RMSNorm"),
    ("torch", "LayerNorm", True, "LayerNorm")])
def test_apex_has_layer_norms_alone(monkeypatch, kind, of, apex, expected):
    monkeypatch.setattr(norm, "have_apex", lambda: apex)
    assert norm.norm_class(kind, of).__name__ == expected


def by_hand(gradient, x, weight, mean, rstd):
    """In place of the kernel: the derivative of (x - mean) rstd weight + bias, of its formula."""
    normed = (x - mean[:, None]) * rstd[:, None]
    of_normed = gradient * weight
    of_x = rstd[:, None] * (of_normed - of_normed.mean(1, True)
                            - normed * (of_normed * normed).mean(1, True))
    return of_x, (gradient * normed).sum(0), gradient.sum(0)


def test_a_layer_norm_with_a_backward_of_its_own_is_that_of_float64(monkeypatch):
    kernels = SimpleNamespace(layer_norm_backward=by_hand)
    monkeypatch.setattr(norm, "norm_kernels", lambda x: kernels)
    layer = norm.LayerNorm(SimpleNamespace(sequence_parallel=True), 8, eps=0.1)
    assert all(p.sequence_parallel for p in layer.parameters())
    draw = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, generator=draw)
    x, gradient = (torch.randn(5, 3, 8, generator=draw) for _ in range(2))
    numbers = [x.requires_grad_(), layer.weight, layer.bias]
    exact = [t.detach().double().requires_grad_() for t in numbers]
    wanted = torch.nn.functional.layer_norm(exact[0], (8,), *exact[1:], 0.1)
    wanted.backward(gradient.double())
    found = layer(x)
    found.backward(gradient)
    for one, of in zip([found, *(t.grad for t in numbers)], [wanted, *(t.grad for t in exact)],
                       strict=True):
        torch.testing.assert_close(one.double(), of, rtol=1e-5, atol=1e-5)
