"""Algorithms whose parameters keep all entries of a weight, while the layer computes with a mask of
its largest magnitudes.

The weight as it runs chooses its mask, in the training precision, inside each slice, at its first
use after a step at which that is due. So replicas and tensor-parallel ranks have the same mask
without communication, whatever shards the fp32 masters. Nothing moves: an entry that leaves the
mask keeps its value and its optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_spdf.section import MOST_STEPS
from megatron_spdf.sparsity.algorithms.base import Tracks

if TYPE_CHECKING:
    from megatron_spdf.sparsity.plan import SparseWeight


class KeepsEntries(Tracks):
    """Keys that such algorithms share."""

    keeps = True

    every: int = Field(1, gt=0, le=MOST_STEPS,
                       description="optimizer steps between choices of the masks")

    def due(self, step: int, steps: int) -> bool:
        return step % self.every == 0

    def rule_violations(self, steps: int) -> Iterator[str]:
        if not self.moves(steps - 1):  # one after the last step is of no use
            yield (f"sparsity.update.every={self.every} of {steps:,} steps chooses masks once, of "
                   "initial weights; lower every, or train longer")

    def check(self, weight: SparseWeight) -> None:
        """Requires that a weight can be trained so.

        Raises:
            ValueError: its pattern does not choose by magnitude.
        """
        if not weight.pattern.chooses:
            raise ValueError(f"sparsity.algorithm={self.name} keeps the largest magnitudes, and "
                             f"sparsity.pattern={weight.pattern.name} has no mask of them; take "
                             "pattern=unstructured, or algorithm=static")

    def decay(self, weight: SparseWeight) -> tuple[float, float]:
        """What times the weight is added to the gradient of the loss: of active entries, and of
        those that are trained beside them."""
        return 0.0, 0.0
