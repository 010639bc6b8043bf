"""A mask algorithm of our own that needs the dense gradient: the smallest magnitudes die, and the
entries with the largest gradient are born."""

from __future__ import annotations

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, Moment, MovingMasks
from megatron_spdf.sparsity.mask_slice import MaskSlice, Move


class ByGradient(MovingMasks):
    """Magnitudes against gradients."""

    name = "by_gradient"
    needs = "dense_gradient"

    def select(self, part: MaskSlice, when: Moment) -> Move:
        count = self.count(len(part.active), when)
        return Move(part.lowest(part.values.abs(), part.active, count),
                    part.lowest(-part.gradient[part.inactive].abs(), part.inactive, count))


ALGORITHMS.register("by_gradient", ByGradient)
