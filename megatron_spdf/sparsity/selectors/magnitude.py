"""The largest magnitudes of each slice stay."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.selectors.base import SELECTORS, Inputs, Selector, largest_masks


class Magnitude(Selector):
    """The largest magnitudes of each slice."""

    name = "magnitude"
    how = "the largest magnitudes in each slice"

    def select(self, weight: Tensor, planned: SparseWeight, seed: int,
               inputs: Inputs | None) -> tuple[Tensor, np.ndarray]:
        return weight, largest_masks(weight, planned)


SELECTORS.register(Magnitude.name, Magnitude)
