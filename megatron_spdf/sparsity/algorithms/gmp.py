"""Gradual magnitude pruning (Zhu and Gupta 2017): the smallest weights die, up to the level.

s(t) = s + (s_i - s) (1 - t)^3, t from 0 at `start` to 1 at `stop`, of every slice, by the fp32
master weights, ties by position. The run begins dense, or at s_i = `initial` s. It goes through
parts, each of which stores its weights at the density that pruning has come to at its beginning;
until the next border what dies is held at zero in its place. So the numbers are those of pruning a
dense weight, and memory falls step by step.

The defaults are those of sparse scaling laws for language models (Frantar et al. 2023, Jin et al.
2025): a quarter of the steps dense, half of them pruning every 100 steps, a quarter at the level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_spdf.section import MOST_STEPS
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MaskAlgorithm, Moment, Move, Part

if TYPE_CHECKING:  # the planner goes without PyTorch
    from megatron_spdf.sparsity.mask_slice import MaskSlice


class Gmp(MaskAlgorithm):
    """Keys of gradual magnitude pruning."""

    name = "gmp"
    needs = "values"
    holds = True
    to_begin_sparse = "sparsity.update.initial to the share of the level that it begins at"

    every: int = Field(100, gt=0, le=MOST_STEPS, description="optimizer steps between prunings")
    start: float = Field(0.25, ge=0.0, lt=1.0,
                         description="share of the run's or stage's steps that are dense")
    stop: float = Field(0.75, gt=0.0, le=1.0,
                        description="share of the steps after which the level is reached")
    stores: int = Field(4, gt=0, le=1000,
                        description="densities that weights are stored at one after another, "
                                    "beside dense; more save more memory")
    initial: float = Field(0.0, ge=0.0, lt=1.0,
                           description="share of the level that weights begin at; 0: dense")

    @model_validator(mode="after")
    def _starts_before_it_stops(self) -> Gmp:
        if self.start >= self.stop:
            raise PydanticCustomError(
                "order", "start={start} is not under stop={stop}, so that nothing would be pruned; "
                         "lower the first or raise the second",
                {"start": self.start, "stop": self.stop})
        return self

    def share(self, step: int, steps: int) -> float:
        first, last = self._ends(steps)
        t = min(max(step - first, 0), last - first) / (last - first)
        return 1.0 - (1.0 - self.initial) * (1.0 - t) ** 3

    def due(self, step: int, steps: int) -> bool:
        """After every step that `every` divides, and at `stop`."""
        first, last = self._ends(steps)
        return step == last or first < step < last and step % self.every == 0

    def rule_violations(self, steps: int) -> Iterator[str]:
        if not any(self.due(step, steps) for step in range(1, steps)):
            yield (f"sparsity.update.start={self.start:g} and stop={self.stop:g} of {steps:,} "
                   "steps leave none to prune in; lower start, or train longer")

    def parts(self, steps: int) -> list[Part]:
        first, last = self._ends(steps)
        due = [step for step in range(first + 1, last + 1) if self.due(step, steps)]
        borders: list[int] = []
        # the levels at which storage shrinks are evenly spaced; the first is there from the
        # beginning, or dense weights come to it
        for store in range(int(self.initial > 0.0), self.stores):
            wanted = min(1.0, self.initial + (1.0 - self.initial) * store / max(1, self.stores - 1))
            step = next(s for s in due if self.share(s, steps) >= wanted)
            if step not in borders and step < steps:
                borders.append(step)
        begins = [self.initial, *(self.share(step, steps) for step in borders)]
        return [Part(end, reached) for end, reached in zip([*borders, steps], begins, strict=True)]

    @property
    def together(self) -> bool:
        return type(self).select is Gmp.select

    def left(self, active_at: Callable[[float], int], when: Moment) -> int:
        """The number of entries of a slice that stay.

        Args:
            active_at: as of `MaskSlice`.
        """
        return active_at(self.share(when.step, when.steps))

    def select(self, part: MaskSlice, when: Moment) -> Move:
        left = self.left(part.active_at, when)
        died = part.lowest(part.values.abs(), part.active, max(0, len(part.active) - left))
        return Move(died, born=part.active[:0])

    def describe(self) -> str:
        begins = f", from {self.initial:.0%} of the level on" if self.initial else ""
        return (f"smallest magnitudes die every {self.every} steps, by a cubic from "
                f"{self.start:.0%} to {self.stop:.0%} of the steps{begins}")

    def _ends(self, steps: int) -> tuple[int, int]:
        """The last dense step, and the one after which the level is reached."""
        first = min(round(self.start * steps), steps - 1)
        return first, max(round(self.stop * steps), first + 1)


ALGORITHMS.register(Gmp.name, Gmp)
