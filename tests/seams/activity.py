"""A selector of our own in one file: entries stay whose inputs are the most active, whatever their
weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.sparsity.selectors.base import (
    SELECTORS,
    Selector,
    TrainedWeight,
    largest_masks,
)


class MeanMagnitude:
    def __init__(self, columns: int):
        self.sum = torch.zeros(columns)

    def add(self, inputs: Tensor) -> None:
        self.sum += inputs.abs().sum(0)


class Activity(Selector):
    """The largest sums of input magnitudes."""

    name = "activity"
    calibrated = True
    how = "the most active inputs in each slice"

    def inputs(self, columns: int, device: torch.device) -> MeanMagnitude:
        return MeanMagnitude(columns)

    def select(self, trained: TrainedWeight) -> tuple[Tensor, np.ndarray]:
        scores = trained.inputs.sum.expand(trained.planned.shape)
        return trained.values, largest_masks(scores, trained.planned)


SELECTORS.register("activity", Activity)
