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


def by_hand(gradient, x, weight, mean, rstd, residual=None):
    """In place of the kernel: the derivative of (x - mean) rstd weight + bias, of its formula."""
    normed = (x - mean[:, None]) * rstd[:, None]
    of_normed = gradient * weight
    of_x = rstd[:, None] * (of_normed - of_normed.mean(1, True)
                            - normed * (of_normed * normed).mean(1, True))
    of_x = of_x if residual is None else of_x + residual
    return of_x, (gradient * normed).sum(0), gradient.sum(0)


@pytest.mark.parametrize("used", [(True, False), (True, True), (False, True)],
                         ids=["output", "both", "residual"])
def test_a_layer_norm_with_a_backward_of_its_own_is_that_of_float64(monkeypatch, used):
    """Of a norm that begins a residual branch the output, the residual or both may be used."""
    kernels = SimpleNamespace(layer_norm_backward=by_hand)
    monkeypatch.setattr(norm, "norm_kernels", lambda x: kernels)
    kind = norm.ResidualLayerNorm if used[1] else norm.LayerNorm
    layer = kind(SimpleNamespace(sequence_parallel=True), 8, eps=0.1)
    assert all(p.sequence_parallel for p in layer.parameters())
    draw = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, generator=draw)
    x, gradient = (torch.randn(5, 3, 8, generator=draw) for _ in range(2))
    numbers = [x.requires_grad_(), layer.weight, layer.bias]
    exact = [t.detach().double().requires_grad_() for t in numbers]
    wanted = torch.nn.functional.layer_norm(exact[0], (8,), *exact[1:], 0.1)
    (sum(t for t, is_used in zip((wanted, 2 * exact[0]), used, strict=True) if is_used)
     * gradient.double()).sum().backward()
    outputs = layer(x) if used[1] else (layer(x), x)
    torch.testing.assert_close(outputs[0].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[1], x)
    (sum(t for t, is_used in zip((outputs[0], 2 * outputs[1]), used, strict=True) if is_used)
     * gradient).sum().backward()
    for one, of in zip(numbers, exact, strict=True):
        if used[0] or one is x:
            torch.testing.assert_close(one.grad.double(), of.grad, rtol=1e-5, atol=1e-5)
        else:
            assert one.grad is None


@pytest.mark.parametrize(("fields", "name"), [({"fused_residual_rmsnorm": None},
                                               "ResidualLayerNorm"), ({}, "LayerNorm")])
def test_branches_have_norms_with_residuals_where_layers_take_them(monkeypatch, fields, name):
    monkeypatch.setattr(norm.TransformerConfig, "__dataclass_fields__", fields)
    assert norm.residual_norm_class(norm.LayerNorm).__name__ == name
    assert norm.residual_norm_class(norm.RMSNorm) is norm.RMSNorm
