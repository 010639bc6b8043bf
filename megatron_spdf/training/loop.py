"""The training loop: batch -> step -> log -> maybe evaluate -> maybe save, until the tokens are spent."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch

from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState
from megatron_spdf.config import Recipe
from megatron_spdf.data.dataset import TokenData
from megatron_spdf.engine import Engine, StepResult
from megatron_spdf.evaluation.perplexity import bits_per_byte, validation_loss
from megatron_spdf.parallel.signals import StopRequest
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.planning.flops import training_flops
from megatron_spdf.planning.hardware import peak_flops
from megatron_spdf.sparsity.measure import check_sparsity, total_sparsity
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.training import exit_codes
from megatron_spdf.training.run_log import RunLog


class NotFinite(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclass
class Trainer:
    """One rank's view of a run, from where `state` stands to its end."""

    recipe: Recipe
    plan: Plan
    engine: Engine
    data: TokenData
    checkpointer: Checkpointer
    state: RunState
    log: RunLog
    stop: StopRequest
    stopping: bool = False  # some rank was asked to stop; all ranks agree on it

    def run(self) -> int:
        """Trains to the end, or to a request to stop; returns the exit code. Either way the state is saved.

        Raises:
            NotFinite, SparsityDrift: the run cannot go on; nothing after the last good checkpoint is saved.
        """
        recipe, state = self.recipe, self.state
        saved = state.step
        self._evaluate_if_due()  # the evaluation that a stop cut off
        batches = self.data.training_batches(state.step)
        first = state.step + 1
        while state.step < recipe.steps and not self.stopping:
            started = time.perf_counter()
            batch = next(batches)
            fetched = time.perf_counter()
            with TrafficCounter() if state.step + 1 == first else nullcontext() as traffic:
                tokens = (state.step + 1) * recipe.tokens_per_step
                result = self.engine.step(batch, state.step + 1, tokens, self.stop.requested)
            self._count(result)
            if traffic:
                self._report_bytes(traffic)
            if state.step % recipe.log.every == 0 or state.step == recipe.steps:
                self._report(result, seconds=time.perf_counter() - started, waited=fetched - started)
            self.log.advance(result.loss)
            self.stopping = result.stop
            self._evaluate_if_due()
            if recipe.checkpoint.every and state.step % recipe.checkpoint.every == 0:
                saved = self._save()
        if saved != state.step:
            self._save()
        return exit_codes.FINISHED if state.step == recipe.steps else exit_codes.STOPPED_ON_SIGNAL

    def _report_bytes(self, traffic: TrafficCounter) -> None:
        """What rank 0 holds and sends in a step, counted at its buffers and collectives."""
        held = self.engine.state_bytes()
        sent = {f"{operation} {group}": n for (operation, group), n in traffic.bytes.items()}
        self.log.record("bytes", self.state.step, **held, sent_per_step=traffic.total, sent_by_kind=sent)
        self.log.say(f"rank 0 holds {', '.join(f'{k} {n / 2**20:,.1f} MiB' for k, n in held.items())}; "
                     f"sends {traffic.total / 2**20:,.1f} MiB per step")

    def _count(self, result: StepResult) -> None:
        state = self.state
        state.step += 1
        state.optimizer_steps = self.engine.optimizer_steps
        if not result.skipped:
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        self.log.say(f"step {state.step}: skipped, loss {result.loss}, gradient norm {result.grad_norm}; "
                     f"{state.skipped_in_a_row} in a row")
        if state.skipped_in_a_row > self.recipe.guard.max_skipped:
            raise NotFinite(
                f"{state.skipped_in_a_row} steps in a row up to step {state.step} had a non-finite loss or gradient, "
                f"more than guard.max_skipped={self.recipe.guard.max_skipped}; nothing was saved since. Lower "
                "optimizer.lr, lengthen the warm-up, or look at the data of these steps")

    def _report(self, result: StepResult, seconds: float, waited: float) -> None:
        recipe, state = self.recipe, self.state
        measured = self.engine.measured_sparsity()
        model, length = recipe.model, recipe.train.sequence_length
        tokens = state.step * recipe.tokens_per_step
        executed = training_flops(model, length).total * recipe.tokens_per_step / seconds / recipe.parallel.world
        figures = {
            "tokens": tokens,
            "loss": result.loss,
            "lr": self.engine.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": state.skipped,
            "sparsity": total_sparsity(measured, self.plan),
            "flops": training_flops(model, length, self.plan).total * tokens,
            "tokens_per_second": recipe.tokens_per_step / seconds,
            "model_tflops_per_rank": executed / 1e12,  # of the dense matrix products that are executed
            "step_seconds": seconds,
            "data_seconds": waited,
            "memory_bytes": _peak_memory(),
            "source_tokens": self.data.consumed_tokens(state.step),
        }
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak:
            figures["mfu"] = executed / peak
        self.log.record("train", state.step, **figures)
        self.log.say(
            f"step {state.step:>{len(str(recipe.steps))}}/{recipe.steps} | loss {result.loss:.4f} | lr "
            f"{figures['lr']:.2e} | grad norm {result.grad_norm:.3f} | {figures['tokens_per_second']:,.0f} tokens/s | "
            f"{figures['model_tflops_per_rank']:.3g} TFLOP/s"
            + (f" | MFU {figures['mfu']:.1%}" if peak else "") + f" | sparsity {figures['sparsity']:.2%}")

    def _evaluate_if_due(self) -> None:
        """Evaluates every `evaluate.every` steps and at the end, once for each step however often it resumes."""
        state, every = self.state, self.recipe.evaluate.every
        due = state.step == self.recipe.steps or (every and state.step % every == 0 and state.step > 0)
        if not due or not self.data.valid_batches or state.evaluated == state.step or self.stopping:
            return
        loss = validation_loss(self.engine, self.data.validation_batches(), lambda: self.stop.requested)
        if loss is None:
            self.stopping = True
            return
        state.evaluated = state.step
        if not self.log.active:
            return
        bits = bits_per_byte(loss, self.data.valid_tokens_per_byte)
        self.log.record("valid", state.step, loss=loss, perplexity=math.exp(loss), bits_per_byte=bits)
        self.log.say(f"step {state.step}: validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}, "
                     f"{bits:.4f} bits per byte")

    def _save(self) -> int:
        measured = self.engine.measured_sparsity()
        check_sparsity(measured, self.plan)
        started = time.perf_counter()
        path = self.checkpointer.save(self.engine, self.state, measured)
        self.log.say(f"step {self.state.step}: saved {path} in {time.perf_counter() - started:.1f} s")
        return self.state.step


def _peak_memory() -> int:
    """Bytes: the largest allocation of this rank's GPU, or the process's resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
