"""A layer with a bias on each product without a kept dense copy, against float64 with the dense
weight: its output, and the gradients of input, values and bias."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from small_masks import DEVICE, NO_TRITON
from stand_in_library import StandIn

from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.layers.megatron import _Multiply
from megatron_spdf.layers.products.base import Product
from megatron_spdf.layers.products.tiles import TileProduct
from megatron_spdf.layers.products.two_four import TwoFourProduct
from megatron_spdf.sparsity.patterns.tiles import Tiles
from megatron_spdf.sparsity.patterns.two_four import TwoFour
from megatron_spdf.sparsity.patterns.unstructured import Unstructured
from megatron_spdf.sparsity.plan import SparseWeight


def tile_product() -> TileProduct:
    pytest.importorskip("triton", reason=NO_TRITON)
    return TileProduct(import_module("megatron_spdf.kernels.triton_tiles"))


PRODUCTS = {
    "expanded": (Unstructured(), "cpu", Product),
    "2:4": (TwoFour(), "cpu", lambda: TwoFourProduct(StandIn(), torch.float32)),
    "tiles": (Tiles(tile=16), DEVICE, tile_product),  # in Triton's interpreter
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("biased", [True, False])
def test_output_and_gradients_are_those_of_float64(name, biased):
    pattern, device, make = PRODUCTS[name]
    weight = SparseWeight("w", (64, 128), 0, 2, 0.5, pattern)
    compact = CompactWeight(weight, 3, 0, 1, device, make())
    draw = torch.Generator().manual_seed(0)
    numbers = [torch.randn(size, generator=draw).to(device).requires_grad_()
               for size in ((3, 8, 128), compact.values_shape, (64,))]
    x, values, bias = numbers
    y = _Multiply.apply(x, values, bias if biased else None, compact, None, False, False)
    gradient = torch.randn(y.shape, generator=draw).to(device)
    y.backward(gradient)

    exact = [t.detach().double().requires_grad_() for t in numbers]
    active = compact(torch.ones_like(values)).detach() != 0
    dense = compact(values).detach().double().requires_grad_()
    wanted = torch.nn.functional.linear(exact[0], dense, exact[2] if biased else None)
    wanted.backward(gradient.double())
    of_values = compact(values.grad).double()  # at their places
    pairs = [(y, wanted), (x.grad, exact[0].grad), (of_values, dense.grad * active)]
    for found, of in pairs + ([(bias.grad, exact[2].grad)] if biased else []):
        torch.testing.assert_close(found.double(), of, rtol=1e-5, atol=1e-4)
