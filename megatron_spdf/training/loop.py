"""Training loop: batch -> step -> log -> maybe move masks -> maybe evaluate -> maybe save."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

from megatron_spdf import exit_codes
from megatron_spdf.checkpoint.checkpointer import Checkpointer
from megatron_spdf.checkpoint.run_metadata import RunState
from megatron_spdf.checkpoint.saving import SaveFailed
from megatron_spdf.data.finetuning.completions import CompletionData
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.engine.base import Engine, StepResult
from megatron_spdf.evaluation.perplexity import validation_loss
from megatron_spdf.layers.measure import check_sparsity
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.resilience.progress import PROGRESS
from megatron_spdf.resilience.signals import StopRequest
from megatron_spdf.resilience.stragglers import Stragglers
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.schedule.stages import RunStage
from megatron_spdf.training.mask_moves import MaskMoves
from megatron_spdf.training.report import Report


class NotFinite(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclass
class Trainer:
    """Trains a stage of a run from the step of `state` to its end, on one rank.

    Attributes:
        stopping: whether some rank was asked to stop, on which all ranks agree.
    """

    stage: RunStage
    engine: Engine
    data: TokenData | CompletionData
    checkpointer: Checkpointer
    state: RunState
    log: RunLog
    stop: StopRequest
    stopping: bool = False

    def __post_init__(self) -> None:
        self.recipe, self.last = self.stage.recipe, self.stage.last
        self.report = Report(self.stage, self.engine, self.data, self.state, self.log)
        self.moves = MaskMoves(self.stage, self.engine, self.state, self.report)

    def run(self) -> int:
        """Trains to the end of the stage or a request to stop, saves, and returns the exit code.

        Raises:
            NotFinite, SparsityDrift: the run cannot go on; nothing after the last good checkpoint
                is saved.
            SaveFailed: the last save failed, or more in a row than
                `fault_tolerance.max_failed_saves`.
        """
        try:
            self._train()
        finally:
            self.report.saved(self.checkpointer.wait())  # of a good state, also after an error
        more = not self.finished or self.stopping and self.last < self.recipe.steps
        return exit_codes.STOPPED_ON_SIGNAL if more else exit_codes.FINISHED

    def _train(self) -> None:
        """Runs the loop."""
        recipe, state = self.recipe, self.state
        saved = state.step
        self._evaluate_if_due()  # a stop may have cut off the evaluation at this step
        batches = self.data.training_batches(state.step)
        first = state.step + 1
        pace = Stragglers(recipe.log.ranks_every, recipe.log.slow_factor, self.log)
        while not self.finished and not self.stopping:
            # a watched step must not stand still; the first one compiles and sets up for long
            PROGRESS.set_activity(f"step {state.step + 1}", watched=state.step + 1 > first)
            pace.begin(state.step + 1)
            started = time.perf_counter()
            batch = next(batches)
            fetched = time.perf_counter()
            self.moves.before_step()
            with TrafficCounter() if state.step + 1 == first else nullcontext() as traffic:
                tokens = (state.step + 1 - self.stage.begin) * recipe.tokens_per_step
                result = self.engine.step(batch, state.step + 1, tokens, self.stop.requested)
            self._count(result)
            pace.end(state.step, fetched - started)
            if traffic:
                self.report.bytes(traffic)
            if state.step % recipe.log.every == 0 or state.step == self.last:
                self.report.step(result, seconds=time.perf_counter() - started,
                                 waited=fetched - started)
            self.moves.after_step(result)
            self.log.advance(result.loss)
            self.stopping = result.stop
            self.report.saved(self.checkpointer.poll())
            best = self._evaluate_if_due() and recipe.checkpoint.best
            if best or self._save_due():
                saved = self._save()
        PROGRESS.set_activity(f"the save at step {state.step}")
        self.report.saved(self.checkpointer.wait())
        if saved != state.step or self.checkpointer.failed_in_a_row:
            self._save()
            self.report.saved(self.checkpointer.wait())
        self._stop_if_saves_fail(allowed=0)

    @property
    def finished(self) -> bool:
        """True once the last step is done, or validation has not improved for `evaluate.patience`
        evaluations."""
        state, patience = self.state, self.recipe.evaluate.patience
        return state.step == self.last or patience > 0 and state.worse >= patience

    def _count(self, result: StepResult) -> None:
        """Updates the state after a step.

        Raises:
            NotFinite: too many steps in a row were skipped.
        """
        state = self.state
        state.step += 1
        state.tokens = self.data.consumed(state.step)
        state.optimizer_steps = self.engine.optimizer_steps
        if not result.skipped:
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        self.report.skipped(result)
        if state.skipped_in_a_row > self.recipe.fault_tolerance.max_skipped:
            raise NotFinite(
                f"{state.skipped_in_a_row} steps in a row up to step {state.step} had a non-finite "
                "loss or gradient, more than "
                f"fault_tolerance.max_skipped={self.recipe.fault_tolerance.max_skipped}; nothing "
                "was saved since. Lower optimizer.lr, lengthen the warm-up, or look at the data of "
                "these steps")

    def _save_due(self) -> bool:
        checkpoint, step = self.recipe.checkpoint, self.state.step
        return step in checkpoint.keep_at or bool(checkpoint.every
                                                  and step % checkpoint.every == 0)

    def _evaluate_if_due(self) -> bool:
        """Evaluates every `evaluate.every` steps and at both ends of a stage, once for each step
        however often a run resumes there.

        Returns:
            Whether the loss is the lowest yet.
        """
        state, every = self.state, self.recipe.evaluate.every
        due = state.step in (self.stage.first, self.last) or (every and state.step % every == 0)
        if (not due or state.step == 0 or not self.data.valid_batches
                or state.evaluated == state.step or self.stopping):
            return False
        PROGRESS.set_activity(f"the evaluation at step {state.step}", watched=True)
        measured = validation_loss(self.engine, self.data.validation_batches(),
                                   lambda: self.stop.requested)
        if measured is None:
            self.stopping = True
            return False
        loss = measured.loss
        state.evaluated = state.step
        better = state.best_loss is None or loss < state.best_loss
        if better:
            if self.recipe.checkpoint.best:
                self.checkpointer.note_best(state.step, loss)
            state.best_step, state.best_loss, state.worse = state.step, loss, 0
        else:
            state.worse += 1
        self.report.validation(measured, better)
        return better

    def _save(self) -> int:
        """Starts a save, once the previous one has ended, and returns the step."""
        started = time.perf_counter()
        PROGRESS.set_activity(f"the save at step {self.state.step}")
        self.report.saved(self.checkpointer.wait())
        self._stop_if_saves_fail(self.recipe.fault_tolerance.max_failed_saves)
        measured = self.moves.as_stored(self.engine.measured_sparsity())
        check_sparsity(measured, self.stage.plan)
        self.checkpointer.save(self.engine, self.state, measured)
        if not self.recipe.checkpoint.asynchronous:
            self.report.saved(self.checkpointer.wait())
        self.log.record("save", self.state.step, stalled_seconds=time.perf_counter() - started)
        return self.state.step

    def _stop_if_saves_fail(self, allowed: int) -> None:
        """Raises SaveFailed after more than `allowed` failed saves in a row."""
        failed = self.checkpointer.failed_in_a_row
        if failed > allowed:
            raise SaveFailed(f"the last {failed} saves failed, see above; make room in "
                             f"{self.checkpointer.directory} and start the run again: it goes on "
                             "from the last complete checkpoint")

