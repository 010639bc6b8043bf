"""A product: y = x W^T of a compact weight W and its gradients, without a kept dense copy of W.

Letters in shapes: N tokens, W (out, in), `values` (slices, active per slice). A file of this room
holds the product of one pattern and registers it under the pattern's name. So may the file of
somebody else's pattern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.mask import Mask
from megatron_spdf.registry import Registry
from megatron_spdf.sparsity.patterns.base import Pattern
from megatron_spdf.sparsity.plan import SparseWeight


class Product:
    """The product with the weight expanded for the moment.

    No copy is kept, and every micro-batch pays for two. A pattern's own product overrides what it
    computes otherwise.
    """

    def tables(self, bits: Tensor, weight: SparseWeight) -> Any:
        """Derives what the product needs from the masks of a rank's slices, once a mask.

        Args:
            bits: as of `kernels.mask.Mask`; on the meta device only shapes matter.

        Returns:
            A dataclass with tensors and plain values, for `Mask.tables`; None: the bits will do.
        """
        return None

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """(N, out) of x (N, in)."""
        return x @ dispatch.expand(values, mask).T

    def biased(self, x: Tensor, values: Tensor, mask: Mask, bias: Tensor) -> Tensor:
        """`forward` and a bias (out,), which a GPU adds within the product."""
        if x.is_cuda:
            return torch.addmm(bias, x, dispatch.expand(values, mask).T)
        return self.forward(x, values, mask) + bias

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """(N, in) of that of y (N, out)."""
        return gradient @ dispatch.expand(values, mask)

    def weight_gradient(self, gradient: Tensor, x: Tensor, mask: Mask,
                        out: Tensor | None) -> Tensor:
        """(slices, active per slice), added to `out` if there is one."""
        return dispatch.compress(gradient.T @ x, mask, out)


class PatternProduct(Product):
    """The product of a pattern, where the device and the dtype allow it.

    Class attributes:
        title: of the pattern's weights, for the log.
    """

    title: str

    @classmethod
    def choose(cls, pattern: Pattern, dense: Tensor) -> Product | None:
        """Returns the product for a weight; None: it is expanded.

        Args:
            dense: the weight that becomes compact; its shape, dtype and device decide.
        """
        raise NotImplementedError

    def biased(self, x: Tensor, values: Tensor, mask: Mask, bias: Tensor) -> Tensor:
        return self.forward(x, values, mask) + bias

    @classmethod
    def describe(cls, pattern: Pattern, device: str, dtype: torch.dtype) -> str:
        """Says what multiplies on a type of device, for the log."""
        raise NotImplementedError


PRODUCTS: Registry[type[PatternProduct]] = Registry("product", "megatron_spdf.layers.products")


def product_of(pattern: Pattern) -> type[PatternProduct] | None:
    """Returns the pattern's own product, if it has one."""
    return PRODUCTS.get(pattern.name) if pattern.name in PRODUCTS.names() else None


def choose_product(weight: SparseWeight, dense: Tensor, dense_copy: str) -> Product | None:
    """Returns what multiplies with the values of a compact weight.

    None: the layer multiplies with the expanded weight.

    Args:
        dense: the weight that becomes compact.
        dense_copy: as of `megatron.sparsify_layer`.
    """
    if dense_copy == "always":
        return None
    own = product_of(weight.pattern)
    product = own.choose(weight.pattern, dense) if own else None
    return Product() if product is None and dense_copy == "per_layer" else product
