"""Random entries stay: the masks that the plan draws, as of a run from initial values."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_spdf.sparsity.selectors.base import SELECTORS, Selector, TrainedWeight


class Random(Selector):
    """The entries of the recipe's random masks."""

    name = "random"
    seeded = True
    how = "the recipe's random masks"

    def select(self, trained: TrainedWeight) -> tuple[Tensor, np.ndarray]:
        planned = trained.planned
        masks = [planned.draw(trained.seed, number) for number in range(planned.slices)]
        return trained.values, np.stack(masks)


SELECTORS.register(Random.name, Random)
