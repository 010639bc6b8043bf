"""2:4 weights on sparse tensor cores: what the libraries are handed is held to PyTorch's own
converter on the CPU, and products with them to dense ones; on a GPU with the libraries
themselves."""

from __future__ import annotations

import pytest
import torch
from stand_in_library import AsCusparseLt, StandIn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from megatron_spdf.kernels import two_four
from megatron_spdf.kernels.two_four import (
    Cutlass,
    _self_test,
    find_two_four,
    fits,
    packed,
    packed_transposed,
)
from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.layers.products.base import Product, choose_product
from megatron_spdf.layers.products.two_four import TwoFourProduct
from megatron_spdf.sparsity.patterns.two_four import TwoFour
from megatron_spdf.sparsity.plan import SparseWeight

WEIGHTS = [SparseWeight("w.out", (256, 128), 0, 4, 0.5, TwoFour()),
           SparseWeight("w.in", (64, 512), 1, 4, 0.5, TwoFour())]
CASES = [(weight, world) for weight in WEIGHTS for world in (1, 2, 4)]
each_layout = pytest.mark.parametrize(("weight", "world"), CASES,
                                      ids=lambda v: getattr(v, "name", v))
DTYPE = torch.bfloat16


def compact_of_last_rank(weight: SparseWeight, world: int,
                         library: two_four.Library) -> CompactWeight:
    return CompactWeight(weight, 3, world - 1, world, "cpu", TwoFourProduct(library, DTYPE))


@each_layout
def test_values_and_metadata_unpack_to_the_weight_and_its_transpose(weight, world):
    """By the inverse of the converter that PyTorch hands to CUTLASS."""
    compact = compact_of_last_rank(weight, world, Cutlass())
    values = torch.randn(compact.values_shape, dtype=DTYPE)
    dense, mask = compact(values), compact.mask
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed(values, mask),
                                                               mask.tables.metadata), dense)
    found = sparse_semi_structured_to_dense_cutlass(packed_transposed(values, mask),
                                                    mask.tables.transposed)
    assert torch.equal(found, dense.T)


@each_layout
def test_values_and_metadata_are_those_that_pytorch_makes_of_the_dense_weight(weight, world):
    """PyTorch takes a value of 0 for an inactive one, and draws some."""
    compact = compact_of_last_rank(weight, world, Cutlass())
    values = torch.randn(compact.values_shape, dtype=DTYPE)
    values[values == 0] = 1.0
    mask = compact.mask
    for ours, theirs in (((packed(values, mask), mask.tables.metadata), compact(values)),
                         ((packed_transposed(values, mask), mask.tables.transposed),
                          compact(values).T.contiguous())):
        for mine, wanted in zip(ours, sparse_semi_structured_from_dense_cutlass(theirs),
                                strict=True):
            assert torch.equal(mine, wanted)


def test_an_active_value_of_zero_stays_where_it_is():
    """PyTorch's converter would take it for an inactive one; metadata come from the mask."""
    compact = compact_of_last_rank(WEIGHTS[0], 1, Cutlass())
    values = torch.randn(compact.values_shape, dtype=DTYPE)
    values[:, ::3] = 0.0
    mask = compact.mask
    found = sparse_semi_structured_to_dense_cutlass(packed(values, mask), mask.tables.metadata)
    assert torch.equal(found, compact(values))


def test_values_that_lie_as_the_library_wants_them_are_not_copied():
    compact = compact_of_last_rank(WEIGHTS[0], 1, Cutlass())
    values = torch.randn(compact.values_shape)
    assert packed(values, compact.mask).data_ptr() == values.data_ptr()


@pytest.mark.parametrize("tokens", [16, 5], ids=["on the library", "expanded"])
@each_layout
def test_products_are_those_of_the_dense_weight(weight, world, tokens):
    library = StandIn()
    compact = compact_of_last_rank(weight, world, library)
    values = torch.randn(compact.values_shape, dtype=torch.float64)
    dense, product, mask = compact(values), compact.product, compact.mask
    x, gradient = (torch.randn(tokens, n, dtype=torch.float64)
                   for n in (dense.shape[1], dense.shape[0]))
    torch.testing.assert_close(product.forward(x, values, mask), x @ dense.T)
    torch.testing.assert_close(product.input_gradient(gradient, values, mask), gradient @ dense)
    torch.testing.assert_close(product.weight_gradient(gradient, x, mask, None),
                               compact.right_inverse(gradient.T @ x))
    assert library.products == (2 if tokens == 16 else 0)


@pytest.mark.parametrize("library", two_four.LIBRARIES, ids=lambda library: library.NAME)
def test_a_library_is_handed_what_it_wants(library, monkeypatch):
    """Its operations replaced by what they are documented to compute."""
    AsCusparseLt.install(monkeypatch)
    _self_test(library, torch.device("cpu"), DTYPE)
    weight = WEIGHTS[1]
    compact = compact_of_last_rank(weight, 1, library)
    values = torch.randn(compact.values_shape, dtype=DTYPE)
    dense, mask = compact(values), compact.mask
    # strided
    x, gradient = (torch.randn(n, 16, dtype=DTYPE).T for n in (dense.shape[1], dense.shape[0]))
    for found, wanted in ((compact.product.forward(x, values, mask), x @ dense.T),
                          (compact.product.input_gradient(gradient, values, mask),
                           gradient @ dense)):
        assert found.is_contiguous() and found.dtype is DTYPE
        torch.testing.assert_close(found, wanted)


def test_a_library_that_computes_something_else_is_found_out(monkeypatch):
    class Wrong(StandIn):
        def multiply(self, values, metadata, x):
            return super().multiply(values.flip(1), metadata, x)

    with pytest.raises(RuntimeError, match="something else than a dense product"):
        _self_test(Wrong(), torch.device("cpu"), DTYPE)
    _self_test(StandIn(), torch.device("cpu"), DTYPE)


def test_the_first_library_that_works_is_taken_and_why_none_is_said(monkeypatch):
    class Broken(StandIn):
        NAME = "broken"

        def multiply(self, values, metadata, x):
            raise RuntimeError("no such GPU")

    real = _self_test
    monkeypatch.setattr(two_four, "_self_test",
                        lambda library, device, dtype: real(library, torch.device("cpu"), dtype))
    choose = two_four.two_four_products.__wrapped__
    monkeypatch.setattr(two_four, "LIBRARIES", (Broken(), StandIn()))
    library, name = choose("cuda", DTYPE)
    assert type(library) is StandIn and name == "stand-in"
    monkeypatch.setattr(two_four, "LIBRARIES", (Broken(),))
    assert choose("cuda", DTYPE) == (None,
                                     "expanded and multiplied as dense weights, since broken does "
                                     "not work here (RuntimeError: no such GPU)")
    assert choose("cuda", torch.float32)[0] is None and choose("cpu", DTYPE)[0] is None


def test_odd_shapes_are_expanded_with_a_word(monkeypatch, caplog):
    monkeypatch.setattr(two_four, "two_four_products", lambda device,
                        dtype: (StandIn(), "stand-in"))
    even, odd = (SparseWeight("w", (64, n), 0, 4, 0.5, TwoFour()) for n in (128, 96))
    assert fits(even.shape) and not fits(odd.shape) and not fits(odd.shape[::-1])
    assert isinstance(choose_product(even, torch.empty(even.shape), "per_step"), TwoFourProduct)
    assert caplog.messages == []
    assert choose_product(odd, torch.empty(odd.shape), "per_step") is None
    assert type(choose_product(odd, torch.empty(odd.shape), "per_layer")) is Product
    (said,) = caplog.messages
    assert "64 x 96" in said and "multiples of 64" in said
    assert choose_product(even, torch.empty(even.shape), "always") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_multiplies_on_its_sparse_tensor_cores():
    library, name = two_four.two_four_products("cuda", DTYPE)
    assert library is not None, name
    weight = WEIGHTS[1]
    compact = CompactWeight(weight, 3, 0, 1, "cuda", TwoFourProduct(library, DTYPE))
    values = torch.randn(compact.values_shape, dtype=DTYPE, device="cuda")
    dense, mask = compact(values), compact.mask
    x, gradient = (torch.randn(64, n, dtype=DTYPE, device="cuda")
                   for n in (dense.shape[1], dense.shape[0]))
    # Sums are fp32 and rounded once to the 8 bits of bf16's mantissa.
    torch.testing.assert_close(compact.product.forward(x, values, mask), x @ dense.T, rtol=8e-3,
                               atol=0.1)
    torch.testing.assert_close(compact.product.input_gradient(gradient, values, mask),
                               gradient @ dense, rtol=8e-3, atol=0.1)
    bits = find_two_four(compact.mask_bits, weight.slice_shape, weight.axis, library, DTYPE)
    assert torch.equal(bits.order, mask.tables.order)


@pytest.mark.parametrize(("version", "capability", "sizes", "dtype", "number"), [
    (800, 9, (2048, 1024, 2048), torch.bfloat16, 17), (801, 9, (2048, 1024, 2048), DTYPE, 0),
    (800, 10, (2048, 1024, 2048), DTYPE, 0), (800, 9, (2048, 1023, 2048), DTYPE, 0),
    (800, 9, (2048, 1024, 2040), DTYPE, 0), (800, 9, (2048, 1024, 2048), torch.float16, 0)])
def test_the_algorithm_is_the_library_s_own_except_where_it_was_measured(
        monkeypatch, version, capability, sizes, dtype, number):
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    two_four.algorithm.cache_clear()
    assert two_four.algorithm(*sizes, dtype) == number
    two_four.algorithm.cache_clear()
