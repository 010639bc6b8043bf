"""A mask algorithm of our own in one file: a tenth of each slice's active entries moves at random
every so many steps."""

from __future__ import annotations

from pydantic import Field

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, Moment, Move, MovingMasks
from megatron_spdf.sparsity.mask_slice import MaskSlice


class Wander(MovingMasks):
    """Random entries die, and as many others are born."""

    name = "wander"

    fraction: float = Field(0.1, ge=0.0, le=1.0,
                            description="of the active entries that move at once")

    def select(self, part: MaskSlice, when: Moment) -> Move:
        count = self.count(len(part.active), when)
        return Move(part.random("die", part.active, count),
                    part.random("be born", part.inactive, count))

    def describe(self) -> str:
        return f"at random, {super().describe()}"


ALGORITHMS.register("wander", Wander)
