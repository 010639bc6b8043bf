"""RigL (Evci et al. 2020): the smallest weights die, those with the largest gradient are born.

Within each slice, by the fp32 master weights and the gradient of the loss of the whole batch with
respect to the dense weight: summed with its sign over micro-batches and replicas, and ranked by
magnitude after that. Ties go by position. What has just died is not born again in the same move,
which the paper leaves open. Unlike the paper's code, the step before a move trains as all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, SmallestDie

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

    from megatron_spdf.sparsity.mask_slice import MaskSlice


class Rigl(SmallestDie):
    """Keys of RigL, with the paper's defaults."""

    name = "rigl"
    needs = "dense_gradient"

    def to_be_born(self, part: MaskSlice) -> Tensor:
        return -part.gradient[part.inactive].abs()

    def describe(self) -> str:
        return ("smallest magnitudes die, entries with the largest gradients are born: "
                f"{super().describe()}")


ALGORITHMS.register(Rigl.name, Rigl)
