"""Moves of the masks in a run: when the algorithm says so, after an optimizer step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from megatron_spdf.checkpoint.run_metadata import RunState
from megatron_spdf.engine.base import Engine, StepResult
from megatron_spdf.engine.moving import count_chosen, count_held, hold_entries, move_masks
from megatron_spdf.layers.compact import collect_dense_gradients, drop_dense_gradients
from megatron_spdf.layers.masked import choose_masks
from megatron_spdf.resilience.progress import PROGRESS
from megatron_spdf.schedule.stages import RunStage
from megatron_spdf.sparsity.algorithms.base import Moment
from megatron_spdf.sparsity.history import Change
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.training.report import Report


@dataclass
class MaskMoves:
    """Moves the masks of a stage of a run; `before_step` and `after_step` stand around every step.

    Moves are due by the number of optimizer steps, so that a step that is skipped for numbers that
    are not finite moves nothing, and the next one makes up for it.

    Attributes:
        born: by weight, the entries born in the last move, some of which may still be zero: all of
            them at first, and later those without a gradient, such as the inputs of a neuron all of
            whose outputs were born with them.
    """

    stage: RunStage
    engine: Engine
    state: RunState
    report: Report
    born: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.algorithm = self.stage.recipe.sparsity.update
        self.steps = self.stage.steps
        self._due = self._collects = self._unreported = False
        if self.state.mask_updates and not self.algorithm.holds:  # resumed: no more than this
            self.born = {name: weight.slices * self._most_born(weight)
                         for name, weight in self.stage.plan.weights.items()}

    def before_step(self) -> None:
        """Lets the step collect the gradients of dense weights if the algorithm needs them then,
        which all ranks know from the number of the step."""
        due = self.algorithm.due(self.engine.optimizer_steps + 1, self.steps)
        self._due = due and bool(self.stage.plan.weights)  # of dense weights the border prunes
        self._collects = self._due and self.algorithm.needs == "dense_gradient"
        if self._collects:
            alone = self.algorithm.collects == "micro_batch"
            collect_dense_gradients(self.engine.models,
                                    last_of=self.engine.recipe.micro_batches if alone else 0)

    def after_step(self, result: StepResult) -> None:
        """Moves the masks if they are due and the step was not skipped."""
        if self.stage.continues and self.state.step == self.stage.first + 1:
            # not before it: a start that ends before any step crosses the border once more
            self.report.crossed(changed_at_border(self.stage))
        if self.algorithm.keeps:
            self._choose(result)
        elif self._due and not result.skipped:
            self.born = self._move()
        if self._collects:
            drop_dense_gradients(self.engine.models)

    def _choose(self, result: StepResult) -> None:
        """Has weights choose their masks in the next step if that is due, and reports the last
        choice when the log is."""
        if self._unreported and self.state.step % self.stage.recipe.log.every == 0:
            self.report.moved(count_chosen(self.engine))
            self._unreported = False
        if self._due and not result.skipped:
            self.state.mask_updates += 1
            self._unreported = True
            choose_masks(self.engine.models)

    def _move(self) -> dict[str, int]:
        state, started = self.state, time.perf_counter()
        PROGRESS.set_activity(f"the move of the masks at step {state.step}", watched=True)
        state.mask_updates += 1
        when = Moment(state.mask_updates, state.optimizer_steps, self.steps)
        act = hold_entries if self.algorithm.holds else move_masks
        changed = act(self.engine, self.algorithm, when)
        self.report.moved(changed, time.perf_counter() - started)
        return {} if self.algorithm.holds else {n: c.moved for n, c in changed.items()}

    def as_stored(self, measured: dict[str, float]) -> dict[str, float]:
        """Measured sparsity by weight, in which active entries that are held or that were born in
        the last move do not count as zeros."""
        weights = self.stage.plan.weights
        if self.algorithm.holds:
            held = count_held(self.engine)
            return {name: sparsity - held.get(name, 0) / weights[name].numel
                    for name, sparsity in measured.items()}
        return {name: sparsity - min(max(0.0, sparsity - weights[name].sparsity),
                                     self.born.get(name, 0) / weights[name].numel)
                for name, sparsity in measured.items()}

    def _most_born(self, weight: SparseWeight) -> int:
        """The most entries of a slice that are born in one move."""
        unit = math.prod(weight.pattern.moving_unit or (1, 1))
        return unit * self.algorithm.largest_move(weight.active_per_slice // unit)


def changed_at_border(stage: RunStage) -> dict[str, Change]:
    """Canonical name -> entries of the whole weight that died, or were born at zero, between a part
    of a stage and the one before it. What was held at zero had died before."""
    algorithm, at = stage.recipe.sparsity.update, stage.first - stage.begin
    ended = next(part for part in algorithm.parts(stage.steps) if part.last == at)
    before = ended.reached
    if algorithm.holds and ended.reached > 0.0:
        before = algorithm.share(at, stage.steps)
    changes = {}
    for name, weight in Plan.of(stage.recipe.stored_at(1.0)).weights.items():
        there, here = (weight.slices * weight.active_at(share)
                       for share in (before, stage.recipe.sparsity.reached))
        changes[name] = Change(abs(there - here), max(there, here))
    return changes
