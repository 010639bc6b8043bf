"""A mask algorithm: when masks move, and which entries of a slice die and which are born.

A file of this room holds one algorithm and registers it. So does a file of somebody else's, see
`registry.py`. An algorithm is also a section of the recipe: its fields are the keys of
`sparsity.update`.

    sparsity: {level: 0.75, algorithm: NAME, update: {every: 100, fraction: 0.3}}

It sees one slice at a time and keeps the number of its active entries. So it needs no
communication, and moves masks the same way at every layout. What carries values and optimizer
state to their new places is the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from megatron_spdf.registry import Registry
from megatron_spdf.section import MOST_STEPS, Section

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

    from megatron_spdf.sparsity.mask_slice import MaskSlice, MaskSlices

Needs = Literal["nothing", "values", "dense_gradient"]
# all of the step, or each data-parallel rank's last
Collects = Literal["step", "micro_batch"]
NewbornRule = Literal["auto", "plain", "ages", "ramp"]
Anneal = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Moment:
    """When a mask moves.

    Attributes:
        update: number of the move in the run, from 1.
        step, steps: optimizer steps that are done of the run or its stage, and all that it has.
    """

    update: int
    step: int
    steps: int


@dataclass(frozen=True)
class Move:
    """The entries of a slice that die and those that are born, as positions: equally many, or none
    are born where the algorithm holds the dead at zero."""

    died: Tensor
    born: Tensor


@dataclass(frozen=True)
class Part:
    """Part of a run that stores its sparse weights at one density.

    Attributes:
        last: its last step.
        reached: share of their levels that weights are stored at, 0 being dense.
    """

    last: int
    reached: float


@dataclass(frozen=True)
class MoveCost:
    """Cost of a move for one weight on a rank, beside that of carrying its state.

    Attributes:
        transient: bytes that are held from the step's first micro-batch until the move.
        reduced: bytes that data-parallel ranks sum up.
        flops: per token of the step, beside those of a step that moves nothing.
    """

    transient: int = 0
    reduced: int = 0
    flops: float = 0


class MaskAlgorithm(Section):
    """Keys of the algorithm: when masks move, and how much of them.

    Attributes:
        needs: to choose; the dense gradient comes with the values.
        holds: what dies is held at zero in its place, and nothing is born.
        stays: masks never move.
        keeps: parameters keep all entries of their weights, see `keeping.py`; nothing moves.
        tracks: its masks are compared with the first one, see `history.py`.
        replaces_decay: the optimizer's weight decay leaves the weights alone.
        exchanges: it chooses by `MaskSlice.exchange`, as patterns ask that tie entries together.
        to_begin_sparse: where runs may begin dense, what is set for one that does not.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = "nothing"
    holds: ClassVar[bool] = False
    stays: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    tracks: ClassVar[bool] = False
    replaces_decay: ClassVar[bool] = False
    exchanges: ClassVar[bool] = False
    to_begin_sparse: ClassVar[str] = ""

    @property
    def together(self) -> bool:
        """Whether the smallest magnitudes of all slices are chosen at once, as `select` would slice
        by slice: `count` of them die, or `left` stay where the dead are held."""
        return False

    @property
    def tracks_ages(self) -> bool:
        """True if the age of every active entry is kept."""
        return False

    @property
    def collects(self) -> Collects:
        """The micro-batches whose dense gradient is summed up, where it needs that."""
        return "step"

    def due(self, step: int, steps: int) -> bool:
        """True if masks move after an optimizer step.

        Args:
            step: from 1, steps that were skipped not counted.
            steps: length of the run or stage.
        """
        return False

    def parts(self, steps: int) -> list[Part]:
        """The parts of a run or stage of so many steps, each with storage of its own. At a border
        the largest magnitudes stay, with their optimizer state, and what is born is zero."""
        return [Part(steps, 1.0)]

    def share(self, step: int, steps: int) -> float:
        """The share of its level that a weight has at a step, which FLOPs go by."""
        return next(part.reached for part in self.parts(steps) if step <= part.last)

    def alike_until(self, step: int, steps: int, others: int) -> bool:
        """True if masks move alike up to a step in runs or stages of two lengths: where `due` and
        `share` are the same, unless the algorithm chooses by the length in another way too."""
        return steps == others or all(
            self.due(s, steps) == self.due(s, others) and self.share(s, steps) == self.share(
                s, others) for s in range(1, step + 1))

    def rule_violations(self, steps: int) -> Iterator[str]:
        """What does not go in a run or stage of so many steps, as sentences."""
        return iter(())

    def largest_move(self, active: int) -> int:
        """The most entries that die in one move of a slice with so many active ones."""
        return 0

    def select(self, part: MaskSlice, when: Moment) -> Move:
        """Chooses the entries of one slice that die and those that are born, equally many.

        What is born was inactive before, so that an entry that has just died is not born again.
        Ties go by position: every replica must choose the same.
        """
        raise NotImplementedError

    def trained(self, entries: int, active: int) -> int:
        """The number of entries of a slice that get a gradient.

        Args:
            entries, active: of the slice.
        """
        return active

    def cost(self, entries: int, active: int, width: int = 4, micro_batches: int = 1) -> MoveCost:
        """Cost of a move.

        Args:
            entries, active: of a weight's part on a rank.
            width: bytes of an entry in training precision.
            micro_batches: of a step.
        """
        if self.needs != "dense_gradient":
            return MoveCost()
        gradient, flops = 4 * entries, 2 * (entries - active)  # a sum is fp32
        if self.collects == "step":
            return MoveCost(gradient, gradient, flops)
        return MoveCost(width * entries, gradient, flops / micro_batches)

    def describe(self) -> str:
        """Says in a line what the algorithm does."""
        raise NotImplementedError

    def moves(self, steps: int) -> int:
        """The number of moves of a run or stage of so many steps."""
        return sum(self.due(step, steps) for step in range(1, steps + 1))

    @classmethod
    def all_fields(cls) -> dict[str, FieldInfo]:
        """The keys of every algorithm, for help."""
        return {key: field for name in ALGORITHMS.names()
                for key, field in ALGORITHMS.get(name).model_fields.items()}


class Tracks(MaskAlgorithm):
    """The key that algorithms share whose masks are compared with the first one."""

    tracks = True

    track_ages: bool = Field(False, description="keep how many moves ago every active entry was "
                                                "born, a byte each, and log the mean")

    @property
    def tracks_ages(self) -> bool:
        return self.track_ages


class Births(MaskAlgorithm):
    """What algorithms share that let entries be born while the optimizer goes on: they start with
    zero state under the step count of the run, see `optimizers/newborn.py`."""

    newborn: NewbornRule = Field(
        "auto", description="how Adam treats what is born; ages: with a step count of its own; "
                            "ramp: with updates that grow over `ramp` steps; plain: as all others; "
                            "auto: ages where optimizer.beta2 makes first updates 1.5 times too "
                            "large or more, else plain")
    ramp: int = Field(100, gt=0, le=MOST_STEPS,
                      description="steps over which updates of what is born grow to the usual, "
                                  "where newborn=ramp")


class MovingMasks(Tracks, Births):
    """The schedule that algorithms share: a fraction of each slice's active entries every so many
    steps."""

    every: int = Field(100, gt=0, le=MOST_STEPS,
                       description="optimizer steps between moves of the masks")
    fraction: float = Field(0.3, ge=0.0, le=1.0,
                            description="of the active entries that die in a move")
    start: float = Field(0.0, ge=0.0, le=1.0,
                         description="share of the run's or stage's steps before the first move")
    stop: float = Field(0.75, ge=0.0, le=1.0, description="share of the steps after which masks "
                                                          "stay")
    anneal: Anneal = Field("constant", description="how `fraction` goes from `start` to `stop`; "
                                                   "cosine: down to 0")
    @model_validator(mode="after")
    def _starts_before_it_stops(self) -> MovingMasks:
        if self.start >= self.stop:
            raise PydanticCustomError(
                "order", "start={start} is not under stop={stop}, so that no mask would move; "
                         "lower the first or raise the second",
                {"start": self.start, "stop": self.stop})
        return self

    def due(self, step: int, steps: int) -> bool:
        """After every step that `every` divides, from `start` on and before `stop`."""
        return step % self.every == 0 and self.start * steps <= step < self.stop * steps

    def alike_until(self, step: int, steps: int, others: int) -> bool:
        anneals = self.anneal != "constant" and steps != others
        moved = anneals and any(self.due(s, steps) for s in range(1, step + 1))
        return not moved and super().alike_until(step, steps, others)

    def largest_move(self, active: int) -> int:
        return round(self.fraction * active)

    def fraction_at(self, when: Moment) -> float:
        """The fraction that dies now: a (1 + cos(pi t)) / 2 with t from 0 at `start` to 1 at `stop`
        (Evci et al. 2020, section 3)."""
        if self.anneal == "constant":
            return self.fraction
        share = (when.step / when.steps - self.start) / (self.stop - self.start)
        return self.fraction * (1.0 + math.cos(math.pi * share)) / 2.0

    def rule_violations(self, steps: int) -> Iterator[str]:
        if not self.moves(steps):
            yield (f"sparsity.update.every={self.every} from start={self.start:g} to "
                   f"stop={self.stop:g} of {steps:,} steps moves no mask; lower every, or train "
                   "longer")

    def count(self, active: int, when: Moment) -> int:
        """The number of entries that die in a slice with so many active ones."""
        return round(self.fraction_at(when) * active)

    def describe(self) -> str:
        falling = ", falling to none," if self.anneal == "cosine" else ""
        return (f"{self.fraction:g} of the active entries of each slice{falling} every "
                f"{self.every} steps, from {self.start:.0%} to {self.stop:.0%} of the steps")


class SmallestDie(MovingMasks):
    """The smallest magnitudes of a slice die, by the fp32 master weights, ties by position."""

    needs = "values"
    exchanges = True

    anneal: Anneal = Field("cosine", description=MovingMasks.model_fields["anneal"].description)

    @property
    def together(self) -> bool:
        return type(self).select is SmallestDie.select

    def select(self, part: MaskSlice, when: Moment) -> Move:
        count = self.count(len(part.active), when)
        return Move(*part.exchange(part.values.abs(), self.to_be_born(part.alone)[0], count))

    def to_be_born(self, slices: MaskSlices) -> Tensor:
        """Scores of the inactive units of each slice, in the order of their positions: (slices,
        n - k). The lowest of a slice are born."""
        raise NotImplementedError


ALGORITHMS: Registry[type[MaskAlgorithm]] = Registry("mask algorithm",
                                                     "megatron_spdf.sparsity.algorithms")
