"""Masks that stay as they were drawn (Thangarasa et al. 2023)."""

from __future__ import annotations

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MaskAlgorithm


class Static(MaskAlgorithm):
    """Masks that never move."""

    name = "static"
    stays = True

    def describe(self) -> str:
        return "masks stay"


ALGORITHMS.register(Static.name, Static)
