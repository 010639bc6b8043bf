"""Masks that came with the weights and stay, whose slices have different numbers of active entries.

Every slice stores as many entries as the fullest one of its weight. Where a slice has fewer, the
rest are held at zero: they get no gradient, and no update moves them. So parameters have one shape
for all slices, and layouts, engines and checkpoints know nothing of the numbers.
"""

from __future__ import annotations

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MaskAlgorithm


class Imported(MaskAlgorithm):
    """Masks that never move, of slices that may be emptier than the level says."""

    name = "imported"
    holds = True
    stays = True

    def describe(self) -> str:
        return "masks stay as they came with the weights; slices may have more zeros than the level"


ALGORITHMS.register(Imported.name, Imported)
