"""The largest magnitudes of each slice stay."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megatron_spdf.sparsity.selectors.base import (
    SELECTORS,
    Selector,
    TrainedWeight,
    largest_masks,
)


class Magnitude(Selector):
    """The largest magnitudes of each slice."""

    name = "magnitude"
    how = "the largest magnitudes in each slice"

    def select(self, trained: TrainedWeight) -> tuple[Tensor, np.ndarray]:
        return trained.values, largest_masks(trained.values, trained.planned)


SELECTORS.register(Magnitude.name, Magnitude)
