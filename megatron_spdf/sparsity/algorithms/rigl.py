"""RigL (Evci et al. 2020): the smallest weights die, those with the largest gradient are born.

Within each slice, by the fp32 master weights and the gradient of the loss of the whole batch with
respect to the dense weight: summed with its sign over micro-batches and replicas, and ranked by
magnitude after that. Ties go by position. What has just died is not born again in the same move,
which the paper leaves open. Unlike the paper's code, the step before a move trains as all others.

`gradient: micro_batch` is an approximation: the sum is that of each data-parallel rank's last
micro-batch. It is kept as backward made it, without a buffer to add to, and where no dense copy is
kept the products of the other micro-batches are spared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, Collects, SmallestDie

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

    from megatron_spdf.sparsity.mask_slice import MaskSlices


class Rigl(SmallestDie):
    """Keys of RigL, with the paper's defaults."""

    name = "rigl"
    needs = "dense_gradient"

    gradient: Collects = Field(
        "step", description="that ranks what is born; step: of all micro-batches; micro_batch: of "
                            "each data-parallel rank's last, an approximation that holds less and "
                            "depends on the layout")

    @property
    def collects(self) -> Collects:
        return self.gradient

    def to_be_born(self, slices: MaskSlices) -> Tensor:
        return -slices.inactive_gradients().abs()

    def describe(self) -> str:
        return ("smallest magnitudes die, entries with the largest gradients are born: "
                f"{super().describe()}")


ALGORITHMS.register(Rigl.name, Rigl)
