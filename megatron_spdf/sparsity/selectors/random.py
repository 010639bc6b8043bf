"""Random entries stay: the masks that the plan draws, as of a run from initial values."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.selectors.base import SELECTORS, Inputs, Selector


class Random(Selector):
    """The entries of the recipe's random masks."""

    name = "random"
    seeded = True
    how = "the recipe's random masks"

    def select(self, weight: Tensor, planned: SparseWeight, seed: int,
               inputs: Inputs | None) -> tuple[Tensor, np.ndarray]:
        return weight, np.stack([planned.draw(seed, number) for number in range(planned.slices)])


SELECTORS.register(Random.name, Random)
