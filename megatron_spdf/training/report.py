"""Figures of a run, for its log: steps, evaluations, saves, bytes held and sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from megatron_spdf.checkpoint.run_metadata import RunState
from megatron_spdf.checkpoint.saving import SaveThread
from megatron_spdf.data.finetuning.completions import CompletionData
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.engine.base import Engine, StepResult
from megatron_spdf.evaluation.perplexity import Validation, bits_per_byte, perplexity
from megatron_spdf.layers.measure import total_sparsity
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.planning.hardware import peak_flops
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.schedule.flops import recipe_flops
from megatron_spdf.schedule.stages import RunStage
from megatron_spdf.sparsity.history import NOTHING, Change, by_layer


@dataclass(frozen=True)
class Report:
    """Writes records and lines to the log of a run, each at the step where `state` stands."""

    stage: RunStage
    engine: Engine
    data: TokenData | CompletionData
    state: RunState
    log: RunLog

    def step(self, result: StepResult, seconds: float, waited: float) -> None:
        """Reports loss, speed, sparsity and FLOPs at a step.

        Args:
            seconds: of the step, its data included.
            waited: seconds of it spent waiting for data.
        """
        recipe, figures = self.stage.recipe, self._figures(result, seconds, waited)
        parts = "".join(f", {name.replace('_', ' ')} {value:.4f}"
                        for name, value in result.parts.items())
        mfu = f" | MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
        self.log.record("train", self.state.step, **figures)
        self.log.say(
            f"step {self.state.step:>{len(str(recipe.steps))}}/{recipe.steps} "
            f"| loss {result.loss:.4f}{parts} | lr {figures['lr']:.2e} "
            f"| grad norm {result.grad_norm:.3f} "
            f"| {figures['tokens_per_second']:,.0f} tokens/s "
            f"| {figures['model_tflops_per_rank']:.3g} TFLOP/s{mfu} "
            f"| sparsity {figures['sparsity']:.2%}")

    def _figures(self, result: StepResult, seconds: float, waited: float) -> dict[str, Any]:
        stage, state, data = self.stage, self.state, self.data
        recipe, plan, on_gpu = stage.recipe, stage.plan, torch.cuda.is_available()
        length = data.mean_length
        tokens = state.tokens - data.consumed(state.step - 1)  # of this step
        # dense matrix products that are executed: a GPU skips the zeros of some patterns only
        skipped = plan.skipped if on_gpu else None
        executed = (recipe_flops(recipe, skipped, length=length).total * tokens / seconds
                    / recipe.parallel.world)
        figures = {
            "tokens": state.tokens,
            "loss": result.loss,
            **result.parts,
            **self._learning_rates(),
            "grad_norm": result.grad_norm,
            "skipped": state.skipped,
            "sparsity": total_sparsity(self.engine.measured_sparsity(), plan),
            "flops": stage.flops_before
            + recipe_flops(recipe, stage.mean_plan, length=length).total
            * (state.tokens - data.consumed(stage.first)),
            "tokens_per_second": tokens / seconds,
            "model_tflops_per_rank": executed / 1e12,
            "step_seconds": seconds,
            "data_seconds": waited,
            "memory_bytes": _peak_memory(),
            "source_tokens": data.consumed_by_source(state.step),
        }
        if on_gpu and (peak := peak_flops(torch.cuda.get_device_name(), recipe.train.precision)):
            figures["mfu"] = executed / peak
        return figures

    def _learning_rates(self) -> dict[str, float]:
        """Learning rates of the groups that have one of their own, which rise and fall together."""
        o, lr = self.stage.recipe.optimizer, self.engine.learning_rate
        own = {"embedding_lr": o.peak("embedding"), "norm_lr": o.peak("norm")}
        return {"lr": lr, **{key: lr / o.lr * peak for key, peak in own.items() if peak != o.lr}}

    def skipped(self, result: StepResult) -> None:
        """Reports a step that was skipped for non-finite numbers."""
        self.log.say(f"step {self.state.step}: skipped, loss {result.loss}, gradient norm "
                     f"{result.grad_norm}; {self.state.skipped_in_a_row} in a row")

    def moved(self, changes: dict[str, Change], seconds: float | None = None) -> None:
        """A move of the masks, in all and by layer.

        Args:
            changes: of each sparse weight.
            seconds: it took; None: it was part of a step.
        """
        whole = self._record_masks(changes, {} if seconds is None else {"seconds": seconds})
        state, sparsity = self.state, self.stage.recipe.sparsity
        overlap = f"; {whole.overlap:.2%} are as at first" if sparsity.update.tracks else ""
        self.log.say(f"step {state.step}: {sparsity.algorithm} moved {whole.moved:,} of "
                     f"{whole.active:,} active entries, update {state.mask_updates}{overlap}")

    def crossed(self, changes: dict[str, Change]) -> None:
        """A border between parts of a run, if entries died or were born there; see `moved`."""
        if not any(change.moved for change in changes.values()):
            return
        whole, plan = self._record_masks(changes, {}), self.stage.plan
        self.log.say(f"step {self.state.step}: {self.stage.recipe.sparsity.algorithm} "
                     f"{'masks' if plan.weights else 'lets go of the masks of'} {whole.moved:,} of "
                     f"{whole.active:,} entries from here on")

    def _record_masks(self, changes: dict[str, Change], took: dict[str, float]) -> Change:
        """Writes a record of masks, in all and by layer, and returns all changes together."""
        state, recipe = self.state, self.stage.recipe
        whole = sum(changes.values(), start=NOTHING)
        layers = by_layer(changes, {w.name: w.layer for w in recipe.model.weights()})
        self.log.record("mask", state.step, algorithm=recipe.sparsity.algorithm,
                        update=state.mask_updates, moved=whole.moved, **self._seen(whole), **took,
                        layers={str(n): self._seen(change) for n, change in layers.items()})
        return whole

    def _seen(self, change: Change) -> dict[str, float]:
        """What the log says of a move: what its algorithm keeps track of."""
        algorithm = self.stage.recipe.sparsity.update
        return {"share": change.share,
                **({"overlap": change.overlap} if algorithm.tracks else {}),
                **({"age": change.mean_age} if algorithm.tracks_ages else {})}

    def validation(self, measured: Validation, better: bool) -> None:
        """Reports the loss of an evaluation.

        Args:
            better: whether it is the lowest yet.
        """
        if not self.log.active:
            return
        state, loss = self.state, measured.loss
        figures = {"loss": loss, "perplexity": perplexity(loss)}
        line = f"step {state.step}: validation loss {loss:.4f}, " + (
            "no perplexity, since the model has diverged" if figures["perplexity"] is None
            else f"perplexity {figures['perplexity']:.2f}")
        if self.data.valid_tokens_per_byte is not None:
            figures["bits_per_byte"] = bits_per_byte(loss, self.data.valid_tokens_per_byte)
            line += f", {figures['bits_per_byte']:.4f} bits per byte"
        if not better:
            line += f"; no better than at step {state.best_step}, {state.worse} in a row"
        if measured.standard_error is not None:
            figures["standard_error"] = measured.standard_error
        self.log.record("valid", state.step, **figures)
        self.log.say(line)

    def saved(self, saving: SaveThread | None) -> None:
        """Reports a save that has ended, if there is one."""
        if saving and saving.error:
            self.log.say(f"could NOT save {saving.path}: {saving.error}; the checkpoints before it "
                         "are untouched")
        elif saving:
            self.log.say("; ".join([f"saved {saving.path}, written in {saving.seconds:.1f} s",
                                    *saving.said]))

    def bytes(self, traffic: TrafficCounter) -> None:
        """Reports the bytes that rank 0 holds and sends in a step, counted at its buffers and
        collectives."""
        held = self.engine.state_bytes()
        sent = {f"{operation} {group}": n for (operation, group), n in traffic.bytes.items()}
        self.log.record("bytes", self.state.step, **held, sent_per_step=traffic.total,
                        sent_by_kind=sent, choices=self.engine.choices)
        self.log.say("rank 0 holds "
                     f"{', '.join(f'{k} {n / 2**20:,.1f} MiB' for k, n in held.items())}; sends "
                     f"{traffic.total / 2**20:,.1f} MiB per step")


def _peak_memory() -> int:
    """Bytes: the largest allocation of this rank's GPU, or the process's resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
