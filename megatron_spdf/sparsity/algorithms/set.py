"""Sparse evolutionary training (Mocanu et al. 2018): the smallest weights die, random ones are
born.

Within each slice, by the fp32 master weights, ties by position. What has just died is not born
again in the same move. The defaults are those of GPT-3 recipes with SET (Cerebras model zoo): the
paper itself moves 0.3 after every epoch, to the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, SmallestDie

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

    from megatron_spdf.sparsity.mask_slice import MaskSlices


class Set(SmallestDie):
    """Keys of SET, with the defaults of the GPT-3 recipes."""

    name = "set"

    def to_be_born(self, slices: MaskSlices) -> Tensor:
        return slices.random_scores("be born")

    def describe(self) -> str:
        return f"smallest magnitudes die, random entries are born: {super().describe()}"


ALGORITHMS.register(Set.name, Set)
