"""The training loop: batch -> step -> log -> maybe evaluate -> maybe save, until the tokens are
spent."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch

from megatron_spdf import exit_codes
from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState
from megatron_spdf.checkpoint.saving import SaveFailed, Saving
from megatron_spdf.data.finetuning.completions import CompletionData
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.engine.base import Engine, StepResult
from megatron_spdf.evaluation.perplexity import bits_per_byte, validation_loss
from megatron_spdf.layers.measure import check_sparsity, total_sparsity
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.planning.hardware import peak_flops
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.progress import PROGRESS
from megatron_spdf.resilience.signals import StopRequest
from megatron_spdf.resilience.stragglers import Stragglers
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.sparsity.plan import Plan


class NotFinite(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclass
class Trainer:
    """One rank's view of a run, from where `state` stands to its end, or to that of one of its
    stages.

    Attributes:
        first, last: the stage has the steps first + 1 ... last; None: the run's last. The schedule
            begins with it.
        flops_before: of training up to step `first`.
    """

    recipe: Recipe
    plan: Plan
    engine: Engine
    data: TokenData | CompletionData
    checkpointer: Checkpointer
    state: RunState
    log: RunLog
    stop: StopRequest
    first: int = 0
    last: int | None = None
    flops_before: float = 0.0
    stopping: bool = False  # some rank was asked to stop; all ranks agree on it

    def __post_init__(self) -> None:
        self.last = self.last or self.recipe.steps

    def run(self) -> int:
        """Trains to the end, or to a request to stop; returns the exit code. Either way the state
        is saved.

        Raises:
            NotFinite, SparsityDrift: the run cannot go on; nothing after the last good checkpoint
                is saved.
            SaveFailed: the last save failed, or more in a row than
                `fault_tolerance.max_failed_saves`.
        """
        try:
            self._train()
        finally:
            self._report_saved(self.checkpointer.wait())  # a good state, whatever happened since
        more = not self.finished or self.stopping and self.last < self.recipe.steps
        return exit_codes.STOPPED_ON_SIGNAL if more else exit_codes.FINISHED

    def _train(self) -> None:
        recipe, state = self.recipe, self.state
        saved = state.step
        self._evaluate_if_due()  # the evaluation that a stop cut off
        batches = self.data.training_batches(state.step)
        first = state.step + 1
        pace = Stragglers(recipe.log.ranks_every, recipe.log.slow_factor, self.log)
        while not self.finished and not self.stopping:
            # the first one compiles and sets up
            PROGRESS.enter(f"step {state.step + 1}", watched=state.step + 1 > first)
            pace.begin(state.step + 1)
            started = time.perf_counter()
            batch = next(batches)
            fetched = time.perf_counter()
            with TrafficCounter() if state.step + 1 == first else nullcontext() as traffic:
                tokens = (state.step + 1 - self.first) * recipe.tokens_per_step
                result = self.engine.step(batch, state.step + 1, tokens, self.stop.requested)
            self._count(result)
            pace.end(state.step, fetched - started)
            if traffic:
                self._report_bytes(traffic)
            if state.step % recipe.log.every == 0 or state.step == self.last:
                self._report(result, seconds=time.perf_counter() - started,
                             waited=fetched - started)
            self.log.advance(result.loss)
            self.stopping = result.stop
            self._report_saved(self.checkpointer.poll())
            best = self._evaluate_if_due() and recipe.checkpoint.best
            if best or recipe.checkpoint.every and state.step % recipe.checkpoint.every == 0:
                saved = self._save()
        PROGRESS.enter(f"the save at step {state.step}")
        self._report_saved(self.checkpointer.wait())
        if saved != state.step or self.checkpointer.failed_in_a_row:
            self._save()
            self._report_saved(self.checkpointer.wait())
        self._stop_if_saves_fail(allowed=0)

    @property
    def finished(self) -> bool:
        """The last step is done, or validation has not improved for too long."""
        state, patience = self.state, self.recipe.evaluate.patience
        return state.step == self.last or patience > 0 and state.worse >= patience

    def _report_bytes(self, traffic: TrafficCounter) -> None:
        """What rank 0 holds and sends in a step, counted at its buffers and collectives."""
        held = self.engine.state_bytes()
        sent = {f"{operation} {group}": n for (operation, group), n in traffic.bytes.items()}
        self.log.record("bytes", self.state.step, **held, sent_per_step=traffic.total,
                        sent_by_kind=sent, choices=self.engine.choices)
        self.log.say("rank 0 holds "
                     f"{', '.join(f'{k} {n / 2**20:,.1f} MiB' for k, n in held.items())}; sends "
                     f"{traffic.total / 2**20:,.1f} MiB per step")

    def _count(self, result: StepResult) -> None:
        state = self.state
        state.step += 1
        state.tokens = self.data.consumed(state.step)
        state.optimizer_steps = self.engine.optimizer_steps
        if not result.skipped:
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        self.log.say(f"step {state.step}: skipped, loss {result.loss}, gradient norm "
                     f"{result.grad_norm}; {state.skipped_in_a_row} in a row")
        if state.skipped_in_a_row > self.recipe.fault_tolerance.max_skipped:
            raise NotFinite(
                f"{state.skipped_in_a_row} steps in a row up to step {state.step} had a non-finite "
                "loss or gradient, more than "
                f"fault_tolerance.max_skipped={self.recipe.fault_tolerance.max_skipped}; nothing "
                "was saved since. Lower optimizer.lr, lengthen the warm-up, or look at the data of "
                "these steps")

    def _report(self, result: StepResult, seconds: float, waited: float) -> None:
        recipe, state = self.recipe, self.state
        measured = self.engine.measured_sparsity()
        model, length = recipe.model, self.data.mean_length
        tokens = state.tokens - self.data.consumed(state.step - 1)  # of this step
        skipped = self.plan.skipped if torch.cuda.is_available() else None
        executed = training_flops(model, length,
                                  skipped).total * tokens / seconds / recipe.parallel.world
        figures = {
            "tokens": state.tokens,
            "loss": result.loss,
            "lr": self.engine.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": state.skipped,
            "sparsity": total_sparsity(measured, self.plan),
            "flops": self.flops_before + training_flops(model, length, self.plan).total
            * (state.tokens - self.data.consumed(self.first)),
            "tokens_per_second": tokens / seconds,
            # of the dense matrix products that are executed
            "model_tflops_per_rank": executed / 1e12,
            "step_seconds": seconds,
            "data_seconds": waited,
            "memory_bytes": _peak_memory(),
            "source_tokens": self.data.consumed_by_source(state.step),
        }
        peak = torch.cuda.is_available() and peak_flops(torch.cuda.get_device_name(),
                                                        recipe.train.precision)
        if peak:
            figures["mfu"] = executed / peak
        self.log.record("train", state.step, **figures)
        self.log.say(
            f"step {state.step:>{len(str(recipe.steps))}}/{recipe.steps} | loss {result.loss:.4f} "
            f"| lr {figures['lr']:.2e} | grad norm {result.grad_norm:.3f} | "
            f"{figures['tokens_per_second']:,.0f} tokens/s | "
            f"{figures['model_tflops_per_rank']:.3g} TFLOP/s"
            + (f" | MFU {figures['mfu']:.1%}" if peak else "")
            + f" | sparsity {figures['sparsity']:.2%}")

    def _evaluate_if_due(self) -> bool:
        """Evaluates every `evaluate.every` steps and at the end of a stage, once for each step
        however often it resumes; returns whether the loss is the lowest yet."""
        state, every = self.state, self.recipe.evaluate.every
        due = state.step in (self.first, self.last) or (every and state.step % every == 0)
        if (
            not due
            or state.step == 0
            or not self.data.valid_batches
            or state.evaluated == state.step
            or self.stopping
        ):
            return False
        PROGRESS.enter(f"the evaluation at step {state.step}", watched=True)
        loss = validation_loss(self.engine, self.data.validation_batches(),
                               lambda: self.stop.requested)
        if loss is None:
            self.stopping = True
            return False
        state.evaluated = state.step
        better = state.best_loss is None or loss < state.best_loss
        if better:
            if self.recipe.checkpoint.best:
                self.checkpointer.note_best(state.step, loss)
            state.best_step, state.best_loss, state.worse = state.step, loss, 0
        else:
            state.worse += 1
        self._report_validation(loss, better)
        return better

    def _report_validation(self, loss: float, better: bool) -> None:
        if not self.log.active:
            return
        perplexity = math.exp(min(loss, 700.0))  # of a run that diverged, within what a float holds
        state, figures = self.state, {"loss": loss, "perplexity": perplexity}
        if self.data.valid_tokens_per_byte is not None:
            figures["bits_per_byte"] = bits_per_byte(loss, self.data.valid_tokens_per_byte)
        self.log.record("valid", state.step, **figures)
        self.log.say(f"step {state.step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}"
                     + (f", {figures['bits_per_byte']:.4f} bits per byte"
                        if "bits_per_byte" in figures else "")
                     + ("" if better else f"; no better than at step {state.best_step}, "
                                          f"{state.worse} in a row"))

    def _save(self) -> int:
        """Starts a save, when the one before is done; returns the step."""
        started = time.perf_counter()
        PROGRESS.enter(f"the save at step {self.state.step}")
        self._report_saved(self.checkpointer.wait())
        self._stop_if_saves_fail(self.recipe.fault_tolerance.max_failed_saves)
        measured = self.engine.measured_sparsity()
        check_sparsity(measured, self.plan)
        self.checkpointer.save(self.engine, self.state, measured)
        if not self.recipe.checkpoint.asynchronous:
            self._report_saved(self.checkpointer.wait())
        self.log.record("save", self.state.step, stalled_seconds=time.perf_counter() - started)
        return self.state.step

    def _report_saved(self, saving: Saving | None) -> None:
        if saving and saving.error:
            self.log.say(f"could NOT save {saving.path}: {saving.error}; the checkpoints before it "
                         "are untouched")
        elif saving:
            self.log.say(f"saved {saving.path}, written in {saving.seconds:.1f} s")

    def _stop_if_saves_fail(self, allowed: int) -> None:
        failed = self.checkpointer.failed_in_a_row
        if failed > allowed:
            raise SaveFailed(f"the last {failed} saves failed, see above; make room in "
                             f"{self.checkpointer.directory} and start the run again: it goes on "
                             "from the last complete checkpoint")


def _peak_memory() -> int:
    """Bytes: the largest allocation of this rank's GPU, or the process's resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
