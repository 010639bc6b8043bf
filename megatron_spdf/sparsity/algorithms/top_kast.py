"""Top-KAST (Jayakumar et al. 2020): the layer computes with the largest magnitudes A, and a larger
set B of the largest, A among them, takes the gradient of the dense weight.

Within each slice, ties by position. Entries outside of B stay as they are, but for what is left of
their momentum. The paper's exploration regularization is in place of weight decay, which these
weights have none of: `penalty` times the weight is added to the gradient in A, and that over the
density of A in the rest of B, so that what does not prove itself falls back.

The defaults are those of the paper's language models: B twice as large as A, chosen at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS
from megatron_spdf.sparsity.algorithms.keeping import KeepsEntries

if TYPE_CHECKING:
    from megatron_spdf.sparsity.plan import SparseWeight


class TopKast(KeepsEntries):
    """Keys of Top-KAST."""

    name = "top_kast"
    replaces_decay = True

    backward: float = Field(2.0, ge=1.0, description="entries that learn, over those that are "
                                                     "active")
    penalty: float = Field(1e-4, ge=0.0, description="times the weight is added to the gradient of "
                                                     "active entries; over their density, to that "
                                                     "of others that learn")

    def trained(self, entries: int, active: int) -> int:
        return min(entries, round(self.backward * active))

    def check(self, weight: SparseWeight) -> None:
        if weight.pattern.moving_unit != (1, 1):
            raise ValueError(f"sparsity.algorithm={self.name} compares single entries, and "
                             f"sparsity.pattern={weight.pattern.name} ties them to each other; "
                             "take pattern=unstructured, or algorithm=ste")
        super().check(weight)

    def decay(self, weight: SparseWeight) -> tuple[float, float]:
        return self.penalty, self.penalty / (1.0 - weight.sparsity)

    def describe(self) -> str:
        often = "at every step" if self.every == 1 else f"every {self.every} steps"
        return (f"the largest magnitudes are active, chosen {often}, {self.backward:g} times as "
                f"many learn, pulled to zero by {self.penalty:g}, and the others stay")


ALGORITHMS.register(TopKast.name, TopKast)
