"""The product with the active tiles alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_spdf.kernels import tiles
from megatron_spdf.kernels.mask import Mask
from megatron_spdf.layers.products.base import PRODUCTS, PatternProduct
from megatron_spdf.sparsity.patterns.tiles import Tiles
from megatron_spdf.sparsity.plan import SparseWeight


@dataclass(frozen=True)
class TileProduct(PatternProduct):
    """Product with the active tiles alone."""

    title = "tiles"

    kernels: ModuleType | None  # None on the meta device, where nothing is multiplied

    @classmethod
    def choose(cls, pattern: Tiles, dense: Tensor) -> TileProduct | None:
        if dense.is_meta and tiles.supports_tiles(pattern.tile, dense.dtype):
            return cls(None)
        found, _ = tiles.tile_products(dense.device.type, pattern.tile, dense.dtype)
        return None if found is None else cls(found)

    @classmethod
    def describe(cls, pattern: Tiles, device: str, dtype: torch.dtype) -> str:
        return tiles.tile_products(device, pattern.tile, dtype)[1]

    def tables(self, bits: Tensor, weight: SparseWeight) -> tiles.TileTable:
        size = weight.pattern.tile
        if not bits.is_meta:
            return tiles.find_tiles(bits, weight.slice_shape, weight.axis, size)
        rows, columns = (n * (len(bits) if i == weight.axis else 1) // size
                         for i, n in enumerate(weight.slice_shape))
        active = len(bits) * weight.active_per_slice // size**2
        by_row, by_column = (bits.new_empty((n, active // n), dtype=torch.int32)
                             for n in (rows, columns))
        per_row = weight.pattern.per_row(weight.slice_shape, weight.level)
        return tiles.TileTable(size, per_row, by_row, by_column)

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return self.kernels.forward(x, values, mask)

    def biased(self, x: Tensor, values: Tensor, mask: Mask, bias: Tensor) -> Tensor:
        return self.kernels.forward(x, values, mask, bias=bias)

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return self.kernels.input_gradient(gradient, values, mask)

    def weight_gradient(self, gradient: Tensor, x: Tensor, mask: Mask,
                        out: Tensor | None) -> Tensor:
        return self.kernels.weight_gradient(gradient, x, mask, out)


PRODUCTS.register(Tiles.name, TileProduct)
