"""Straight-through estimation: the layer computes with the largest magnitudes, and all entries take
the gradient of the dense weight (Bengio et al. 2013; as a baseline of language models, jaxpruner,
Lee et al. 2024).

The optimizer updates all entries, and decays all of them. With SR-STE (Zhou et al. 2021) masked
entries are also pulled to zero: `decay` times the weight is added to their gradient, once a step,
before clipping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS
from megatron_spdf.sparsity.algorithms.keeping import KeepsEntries

if TYPE_CHECKING:
    from megatron_spdf.sparsity.plan import SparseWeight


SR_STE = 2e-4  # lambda, of the paper's experiments with n:m


class Ste(KeepsEntries):
    """Keys of straight-through estimation."""

    name = "ste"

    decay_masked: float | None = Field(
        None, ge=0.0, description="times the weight is added to the gradient of masked entries, "
                                  "SR-STE's lambda; null: its 2e-4 for pattern n_m, else none")

    def trained(self, entries: int, active: int) -> int:
        return entries

    def decay(self, weight: SparseWeight) -> tuple[float, float]:
        own = SR_STE if weight.pattern.name == "n_m" else 0.0
        return 0.0, own if self.decay_masked is None else self.decay_masked

    def describe(self) -> str:
        often = "at every step" if self.every == 1 else f"every {self.every} steps"
        pulled = (f", masked entries are pulled to zero by {self.decay_masked:g}"
                  if self.decay_masked else "")
        return (f"the largest magnitudes are active, chosen {often}, and all entries take the "
                f"gradient straight through{pulled}")


ALGORITHMS.register(Ste.name, Ste)
