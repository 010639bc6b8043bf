"""What dies and is born as a whole in a slice: an entry, or a tile of a pattern of tiles.

Letters: n units of a slice, k of them active; E entries of a slice, A of them active.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spdf.sparsity.patterns.base import Shape
from megatron_spdf.sparsity.plan import SparseWeight


@dataclass(frozen=True)
class Units:
    """The units of the slices of a weight, rectangles of entries that fill it.

    Attributes:
        grid: (rows, columns) of units in a slice.
        size: (rows, columns) of entries in a unit.
    """

    grid: Shape
    size: Shape

    @classmethod
    def of(cls, weight: SparseWeight) -> Units:
        rows, columns = weight.slice_shape
        size = weight.pattern.moving_unit
        assert size is not None, weight.name
        return cls((rows // size[0], columns // size[1]), size)

    @property
    def single(self) -> bool:
        """True if each is an entry."""
        return self.size == (1, 1)

    def of_mask(self, entries: Tensor) -> Tensor:
        """(n,) bool, the active units of a mask (E,) bool."""
        rows, columns = self.grid[0] * self.size[0], self.grid[1] * self.size[1]
        return entries.view(rows, columns)[:: self.size[0], :: self.size[1]].reshape(-1)

    def to_mask(self, active: Tensor) -> Tensor:
        """Inverse of `of_mask`: (E,) bool of (n,) bool."""
        (rows, columns), (height, width) = self.grid, self.size
        return active.view(rows, 1, columns, 1).expand(rows, height, columns, width).reshape(-1)

    def magnitudes(self, values: Tensor, mask: Tensor) -> Tensor:
        """(k,), the values of active entries; of tiles the sums of their magnitudes, as in SMET
        (2026), in float64.

        Args:
            values: (A,) of the active entries.
            mask: (E,) bool.
        """
        if self.single:
            return values
        entries = torch.zeros(len(mask), dtype=values.dtype, device=values.device)
        entries[mask] = values.abs()
        return self._by_unit(entries).sum((1, 3), dtype=torch.float64).view(-1)[self.of_mask(mask)]

    def norms(self, gradient: Tensor) -> Tensor:
        """(n,), a gradient (E,) as it is; of tiles its Euclidean norms, in float64."""
        if self.single:
            return gradient
        return torch.linalg.vector_norm(self._by_unit(gradient), dim=(1, 3),
                                        dtype=torch.float64).view(-1)

    def _by_unit(self, entries: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.grid, self.size
        return entries.view(rows, height, columns, width)
