"""What is added to a product on a GPU is added before the product is rounded; and a layer whose
gradient several ranks share is left to Megatron-Core there too."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from on_gpu import on_gpu

from megatron_spdf.layers.products import base
from megatron_spdf.layers.products.base import Product
from megatron_spdf.model.attention import QkvLinear
from megatron_spdf.model.head import Gradients

# 257 - 256: bf16 has 8 bits, so that 257 alone would be 256
X, WEIGHT, BIAS = (torch.tensor(numbers, dtype=torch.bfloat16)
                   for numbers in ([[1.0, 1.0]], [[256.0, 1.0]], [-256.0]))


@pytest.mark.parametrize("chunk", [1, 5])
def test_the_gradient_of_the_heads_weight_is_rounded_nowhere(chunk):
    draw = torch.Generator().manual_seed(0)
    tokens, of_logits, weight = (torch.randn(size, generator=draw).bfloat16()
                                 for size in ((20, 8), (20, 12), (12, 8)))
    gradients = Gradients(tokens, weight, chunk)
    for start in range(0, len(tokens), chunk):
        part = slice(start, start + chunk)
        gradients.add(start, tokens[part], on_gpu(of_logits[part]))
    torch.testing.assert_close(gradients.of_weight.as_subclass(torch.Tensor).double(),
                               of_logits.double().T @ tokens.double(), rtol=1e-5, atol=1e-5)


def test_a_bias_is_added_within_the_product_with_an_expanded_weight(monkeypatch):
    monkeypatch.setattr(base.dispatch, "expand", lambda values, mask: values)
    assert Product().biased(on_gpu(X), WEIGHT, SimpleNamespace(), BIAS).item() == 1.0


@pytest.mark.parametrize(("reduces", "gathers", "gpu"), product([False, True], repeat=3))
def test_the_bias_of_w_qkv_is_added_within_the_product_where_no_other_rank_has_a_part(
        monkeypatch, reduces, gathers, gpu):
    monkeypatch.setattr(ColumnParallelLinear, "_forward_impl",
                        lambda self, **given: torch.tensor(len(given) + 10.0))
    layer = QkvLinear.__new__(QkvLinear)
    found = layer._forward_impl(on_gpu(X) if gpu else X, WEIGHT, BIAS, allreduce_dgrad=reduces,
                                sequence_parallel=gathers)
    assert found.item() == (1.0 if gpu and not reduces and not gathers else 15.0)
