"""Wanda: magnitude times the norm of the input, compared within each output row (Sun et al. 2023,
arXiv 2306.11695).

A slice keeps as many entries as the plan says, and its rows equally many of them; where these do
not divide, the entries that are left over go one by one to the rows with the highest next score.
Slices of a row-parallel weight cut its rows, so that a row is compared within each slice.

Letters: R rows and I columns of a slice, k of its entries active.
"""

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
from megatron_spdf.sparsity.slices import slice_of


class SquaredInputs:
    """Sum of squares of each input of a weight."""

    def __init__(self, columns: int, device: torch.device):
        self._sum, self._tokens = torch.zeros(columns, dtype=torch.float64, device=device), 0

    def add(self, inputs: Tensor) -> None:
        self._sum += inputs.double().square().sum(0)
        self._tokens += len(inputs)

    def root_mean(self) -> Tensor:
        """(in,) float32, the square root of the mean over tokens."""
        return (self._sum / self._tokens).sqrt().float()


class Wanda(Selector):
    """The largest |w| x norm of the input, in each row of each slice."""

    name = "wanda"
    calibrated = True
    how = "the largest magnitudes times input norms in each row of each slice (Wanda)"

    def inputs(self, columns: int, device: torch.device) -> SquaredInputs:
        return SquaredInputs(columns, device)

    def select(self, trained: TrainedWeight) -> tuple[Tensor, np.ndarray]:
        assert isinstance(trained.inputs, SquaredInputs)
        weight, planned = trained.values, trained.planned
        scores = weight.abs() * trained.inputs.root_mean()
        if planned.pattern.columns_together != 1:  # groups of columns, or tiles
            return weight, largest_masks(scores, planned)
        masks = [largest_by_row(slice_of(scores, planned, number).view(planned.slice_shape)
                                .cpu().numpy(), planned.active_per_slice)
                 for number in range(planned.slices)]
        return weight, np.stack(masks).reshape(planned.slices, -1)


def largest_by_row(scores: np.ndarray, active: int) -> np.ndarray:
    """The mask of the highest scores in each row of a slice, (R, I) bool, ties by position.

    Args:
        scores: (R, I), not negative.
        active: k; every row keeps k // R, and k % R rows one more.
    """
    rows, columns = scores.shape
    each, over = divmod(active, rows)
    mask = np.zeros(scores.shape, bool)
    if each:
        lowest = np.partition(scores, columns - each, axis=1)[:, columns - each, None]
        mask = scores > lowest
        ties = scores == lowest
        mask |= ties & (ties.cumsum(1) <= each - mask.sum(1, keepdims=True))
    if over:
        left = np.where(mask, -1.0, scores)
        next_best = left.argmax(1)
        best = np.argsort(-left[np.arange(rows), next_best], kind="stable")[:over]
        mask[best, next_best[best]] = True
    return mask


SELECTORS.register(Wanda.name, Wanda)
