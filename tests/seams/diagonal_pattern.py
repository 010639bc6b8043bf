"""A pattern of our own in one file: bands. The active entries of a row are consecutive and wrap
around, and the bands of two rows that follow each other lie `slope` entries apart.

Its product reads the input at the active entries alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Philox
from pydantic import Field
from torch import Tensor

from megatron_spdf.kernels.mask import Mask, positions
from megatron_spdf.layers.products.base import PRODUCTS, PatternProduct
from megatron_spdf.random_streams import stream_key
from megatron_spdf.sparsity.patterns.base import PATTERNS, Pattern, Shape
from megatron_spdf.sparsity.plan import SparseWeight


class Diagonal(Pattern):
    """A band in every row."""

    name = "diagonal"
    remedy = "a lower level"

    slope: int = Field(1, ge=0, description="entries that the band moves from a row to the next")

    def cut(self, name: str, shape: Shape, axis: int, most: int, level: float) -> int:
        if round((1.0 - level) * shape[1] / (most if axis == 1 else 1)) == 0:
            raise ValueError(f"sparsity.pattern=diagonal on {name} ({shape[0]} x {shape[1]}): "
                             f"level={level:g} leaves no entry of a row; take {self.remedy}")
        return most

    def band(self, shape: Shape, level: float) -> int:
        return round((1.0 - level) * shape[1])

    def active(self, shape: Shape, level: float) -> int:
        return shape[0] * self.band(shape, level)

    def rounded(self, shape: Shape, level: float) -> float:
        return 1.0 - self.band(shape, level) / shape[1]

    def draw(self, seed: int, name: str, slice_id: int, shape: Shape, level: float) -> np.ndarray:
        first = int(Philox(key=stream_key("diagonals", seed, name, slice_id)).random_raw())
        return self._bands(first % shape[1], shape, level)

    def fault(self, masks: np.ndarray, shape: Shape, level: float) -> str | None:
        starts = (masks[:, 0] & ~np.roll(masks[:, 0], 1, axis=-1).astype(bool)).argmax(-1)
        drawn = np.stack([self._bands(first, shape, level) for first in starts])
        return None if np.array_equal(drawn, masks) else "bands"

    def largest(self, values: np.ndarray, level: float) -> np.ndarray:
        bands = [self._bands(first, values.shape, level) for first in range(values.shape[1])]
        return bands[int(np.argmax([np.abs(values)[band].sum() for band in bands]))]

    def _bands(self, first: int, shape: Shape, level: float) -> np.ndarray:
        rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
        return (columns - rows * self.slope - first) % shape[1] < self.band(shape, level)

    @property
    def skips_zeros(self) -> bool:
        return True

    def table_bytes(self, active: int) -> int:
        return 2 * 8 * active

    def describe(self, levels: list[float], degrees: int) -> str:
        return f"bands, {self.slope} entries apart from row to row"


@dataclass(frozen=True)
class Places:
    """Row and column of every active entry, (n,) int64."""

    row: Tensor
    column: Tensor


class DiagonalProduct(PatternProduct):
    """With the active entries alone, in PyTorch."""

    title = "bands"

    @classmethod
    def choose(cls, pattern: Diagonal, dense: Tensor) -> DiagonalProduct:
        return cls()

    @classmethod
    def describe(cls, pattern: Diagonal, device: str, dtype: torch.dtype) -> str:
        return "entry by entry"

    def tables(self, bits: Tensor, weight: SparseWeight) -> Places:
        if bits.is_meta:
            n = len(bits) * weight.active_per_slice
            return Places(*bits.new_empty((2, n), dtype=torch.int64))
        columns = weight.slice_shape[1] * (len(bits) if weight.axis == 1 else 1)
        places = positions(bits, weight.slice_shape, weight.axis)
        return Places(places // columns, places % columns)

    def forward(self, x: Tensor, values: Tensor, mask: Mask) -> Tensor:
        parts, y = x[:, mask.tables.column] * values.reshape(-1), x.new_zeros(len(x), mask.shape[0])
        return y.index_add_(1, mask.tables.row, parts)

    def input_gradient(self, gradient: Tensor, values: Tensor, mask: Mask) -> Tensor:
        parts = gradient[:, mask.tables.row] * values.reshape(-1)
        return gradient.new_zeros(len(gradient), mask.shape[1]).index_add_(1, mask.tables.column,
                                                                           parts)

    def weight_gradient(self, gradient: Tensor, x: Tensor, mask: Mask,
                        out: Tensor | None) -> Tensor:
        found = (gradient[:, mask.tables.row] * x[:, mask.tables.column]).sum(0)
        found = found.view(mask.slices, mask.active)
        return found if out is None else out.add_(found)


PATTERNS.register(Diagonal.name, Diagonal)
PRODUCTS.register(Diagonal.name, DiagonalProduct)
