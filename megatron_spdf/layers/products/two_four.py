"""The product with the active values of a 2:4 weight, on sparse tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spdf.kernels import two_four
from megatron_spdf.kernels.mask import Mask
from megatron_spdf.layers.products.base import PRODUCTS, PatternProduct
from megatron_spdf.sparsity.patterns.two_four import TwoFour
from megatron_spdf.sparsity.plan import SparseWeight


@dataclass(frozen=True)
class TwoFourProduct(PatternProduct):
    """Product with the active values of a 2:4 weight, on sparse tensor cores. The weight's
    gradient, of dense operands, is made whole and cut; and the weight is expanded where the kernels
    do not take the number of tokens."""

    title = "2:4"

    library: two_four.Library
    dtype: torch.dtype

    @classmethod
    def choose(cls, pattern: TwoFour, dense: Tensor) -> TwoFourProduct | None:
        library = two_four.two_four_library(dense)
        return None if library is None else cls(library, dense.dtype)

    @classmethod
    def describe(cls, pattern: TwoFour, device: str, dtype: torch.dtype) -> str:
        return two_four.two_four_products(device, dtype)[1]

    def tables(self, bits: Tensor, weight: SparseWeight) -> two_four.TwoFourTable:
        return two_four.find_two_four(bits, weight.slice_shape, weight.axis, self.library,
                                      self.dtype)

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        if len(x) % two_four.TOKENS:
            return super().forward(x, values, mask)
        return self.library.multiply(two_four.packed(values, mask), mask.tables.metadata, x)

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        if len(gradient) % two_four.TOKENS:
            return super().input_gradient(gradient, values, mask)
        return self.library.multiply(two_four.packed_transposed(values, mask),
                                     mask.tables.transposed, gradient)


PRODUCTS.register(TwoFour.name, TwoFourProduct)
