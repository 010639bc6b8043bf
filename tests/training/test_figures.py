"""Figures of the log against what a step is by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_spdf.checkpoint.run_metadata import RunState
from megatron_spdf.engine.base import StepResult
from megatron_spdf.evaluation.perplexity import (
    Validation,
    bits_per_byte,
    perplexity,
    validation_loss,
)
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.history import Change
from megatron_spdf.training.report import Report

STEP = 8 * 32  # tokens, of which a step has as many


class Log:
    """Keeps what is recorded and said."""

    active = True

    def __init__(self):
        self.records, self.said = {}, []

    def record(self, kind: str, step: int, **figures) -> None:
        self.records[kind] = {"step": step, **figures}

    def say(self, text: str) -> None:
        self.said.append(text)


def report_of(recipe, stage: int, step: int, sparsity=0.0, stages: list | None = None,
              train: dict | None = None, optimizer: dict | None = None, **state) -> Report:
    """Of a run of two replicas whose first half is three quarters sparse."""
    halves = [{"share": 0.5, "sparsity": 0.75}, {"share": 0.5, "sparsity": 0.0}]
    r = recipe(parallel={"data": 2}, sparsity=sparsity, train=train or {},
               optimizer=optimizer or {},
               stages=halves if stages is None else stages)
    chosen = stages_of(r)[stage]
    engine = SimpleNamespace(learning_rate=3e-4, measured_sparsity=lambda: {
        name: weight.sparsity for name, weight in chosen.plan.weights.items()})
    data = SimpleNamespace(consumed=lambda steps: steps * STEP, mean_length=32,
                           valid_tokens_per_byte=0.25,
                           consumed_by_source=lambda steps: {"a": steps * STEP})
    return Report(chosen, engine, data, RunState(step, tokens=step * STEP, **state), Log())


@pytest.mark.parametrize(("stage", "step"), [(0, 1), (0, 5), (1, 6), (1, 10)])
def test_a_step_is_its_tokens_over_its_seconds_and_flops_are_those_of_active_weights(recipe, stage,
                                                                                     step):
    report = report_of(recipe, stage, step)
    report.step(StepResult(2.0, 0.5, skipped=False, stop=False), seconds=0.5, waited=0.1)
    found = report.log.records["train"]
    assert (found["step"], found["tokens"], found["loss"], found["lr"]) == (step, step * STEP, 2.0,
                                                                            3e-4)
    assert (found["step_seconds"], found["data_seconds"]) == (0.5, 0.1)
    assert found["tokens_per_second"] == 2 * STEP
    assert found["sparsity"] == pytest.approx(0.0 if stage else 0.75)
    assert found["source_tokens"] == {"a": step * STEP}
    # table 2 of SPDF's supplement: of 4 layers of width 64, 32 tokens and 256 words
    dense, rest = 72 * 4 * 64**2, 12 * 4 * 32 * 64 + 6 * 256 * 64
    sparse_steps, dense_steps = min(step, 5), max(0, step - 5)
    assert found["flops"] == pytest.approx(STEP * (
        sparse_steps * (dense / 4 + rest) + dense_steps * (dense + rest)))
    # of each of two ranks, as a device multiplies: with all weights
    assert found["model_tflops_per_rank"] == pytest.approx(
        STEP * (dense + rest) / 0.5 / 2 / 1e12)


def test_flops_go_by_the_mean_length_and_by_the_tokens_that_were_read(recipe):
    """Of fine-tuning, whose sequences and steps have other lengths than the longest."""
    report, read = report_of(recipe, 0, 5, stages=[], sparsity=0.75), [0, 100, 250, 260, 400, 450]
    report.data.consumed, report.data.mean_length = read.__getitem__, 12
    report.state.tokens = 450
    report.step(StepResult(2.0, 0.5, skipped=False, stop=False), seconds=0.5, waited=0.1)
    found = report.log.records["train"]
    dense, rest = 72 * 4 * 64**2, 12 * 4 * 12 * 64 + 6 * 256 * 64
    assert found["tokens_per_second"] == 100
    assert found["flops"] == pytest.approx(450 * (dense / 4 + rest))
    assert found["model_tflops_per_rank"] == pytest.approx(50 * (dense + rest) / 0.5 / 2 / 1e12)


def test_flops_of_gradual_pruning_are_those_of_every_step(recipe):
    """Whose density falls between the borders at which storage does."""
    sparsity = {"level": 0.75, "algorithm": "gmp", "update": {"every": 1, "start": 0.2, "stop": 0.8,
                                                              "stores": 2}}
    parts = stages_of(recipe(parallel={"data": 2}, sparsity=sparsity))
    assert len(parts) > 2
    dense, rest = 72 * 4 * 64**2, 12 * 4 * 32 * 64 + 6 * 256 * 64
    for number, part in enumerate(parts):
        report = report_of(recipe, number, part.last, stages=[], sparsity=sparsity)
        report.step(StepResult(2.0, 0.5, skipped=False, stop=False), seconds=0.5, waited=0.1)
        pruned = [1.0 - (1.0 - min(max(step - 2, 0), 6) / 6) ** 3
                  for step in range(1, part.last + 1)]
        assert report.log.records["train"]["flops"] == pytest.approx(
            STEP * sum((1.0 - 0.75 * share) * dense + rest for share in pruned), rel=1e-3)


@pytest.mark.parametrize(("optimizer", "others"), [
    ({}, {}), ({"embedding_lr": 1e-3}, {}), ({"norm_lr": 5e-3}, {"norm_lr": 1.5e-3}),
    ({"embedding_lr": 2e-2}, {"embedding_lr": 6e-3, "norm_lr": 6e-3}),
    ({"embedding_lr": 2e-2, "norm_lr": 1e-3}, {"embedding_lr": 6e-3})], ids=str)
def test_rates_of_groups_are_shown_where_they_differ(recipe, optimizer, others):
    report = report_of(recipe, 0, 1, optimizer=optimizer)  # at 0.3 of the peak of 1e-3
    report.step(StepResult(2.0, 0.5, skipped=False, stop=False), seconds=0.5, waited=0.1)
    found = report.log.records["train"]
    assert found["lr"] == 3e-4
    assert {k: v for k, v in found.items() if k in ("embedding_lr", "norm_lr")} == pytest.approx(
        others)


def test_an_evaluation_is_in_nats_and_bits(recipe):
    report = report_of(recipe, 0, 5, best_step=3, worse=2)
    report.validation(Validation(2.0794415, None), better=False)
    found = report.log.records["valid"]
    assert found["perplexity"] == pytest.approx(8.0)  # three bits a token, of four bytes
    assert found["bits_per_byte"] == pytest.approx(3 / 4)
    assert "no better than at step 3, 2 in a row" in report.log.said[0]


def test_a_gpu_skips_the_zeros_of_tiles_and_a_share_of_its_peak_is_said(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    found = {}
    for pattern in ("tile", "unstructured"):
        report = report_of(recipe, 0, 5, stages=[], sparsity={
            "level": 0.75, "pattern": pattern, "tile": 16}, train={"precision": "bf16"})
        report.step(StepResult(2.0, 0.5, skipped=False, stop=False), seconds=0.5, waited=0.1)
        found[pattern] = report.log.records["train"]
        assert found[pattern]["memory_bytes"] == 12345
        assert f"| MFU {found[pattern]['mfu']:.1%} |" in report.log.said[0]
    dense, rest = 72 * 4 * 64**2, 12 * 4 * 32 * 64 + 6 * 256 * 64
    for pattern, weights in (("tile", dense / 4), ("unstructured", dense)):
        executed = STEP * (weights + rest) / 0.5 / 2
        assert found[pattern]["model_tflops_per_rank"] == pytest.approx(executed / 1e12)
        assert found[pattern]["mfu"] == pytest.approx(executed / 989.4e12, rel=1e-3)


def test_a_line_says_what_a_step_was(recipe):
    report = report_of(recipe, 0, 5, skipped=3)
    report.step(StepResult(2.0, 0.5, skipped=False, stop=False), seconds=0.5, waited=0.1)
    assert report.log.records["train"]["skipped"] == 3  # of the run, and not those in a row
    assert "mfu" not in report.log.records["train"]
    assert report.log.said[0].startswith(
        "step  5/10 | loss 2.0000 | lr 3.00e-04 | grad norm 0.500 | 512 tokens/s | ")
    assert report.log.said[0].endswith(" | sparsity 75.00%")


def test_skipped_steps_moves_and_saves_are_said(recipe):
    report = report_of(recipe, 0, 5, stages=[], skipped_in_a_row=2, mask_updates=3, sparsity={
        "level": 0.75, "algorithm": "set", "update": {"every": 1}})
    report.skipped(StepResult(math.nan, 0.5, skipped=True, stop=False))
    active = report.stage.plan.active
    report.moved({name: Change(w.active // 4, w.active, w.active // 2)
                  for name, w in report.stage.plan.weights.items()}, seconds=0.25)
    found = report.log.records["mask"]
    assert {key: found[key] for key in ("step", "algorithm", "update", "moved", "share",
                                        "seconds")} == {
        "step": 5, "algorithm": "set", "update": 3, "moved": active // 4, "share": 0.25,
        "seconds": 0.25}
    assert list(found["layers"]) == ["0", "1", "2", "3"]
    assert {layer["share"] for layer in found["layers"].values()} == {0.25}
    report.saved(None)
    report.saved(SimpleNamespace(path="a", error=None, seconds=1.25, said=["b", "c"]))
    report.saved(SimpleNamespace(path="a", error=OSError("full"), seconds=1.25, said=[]))
    assert report.log.said == [
        "step 5: skipped, loss nan, gradient norm 0.5; 2 in a row",
        f"step 5: set moved {active // 4:,} of {active:,} active entries, update 3; 50.00% are as "
        "at first",
        "saved a, written in 1.2 s; b; c",
        "could NOT save a: full; the checkpoints before it are untouched"]


def test_a_border_is_reported_where_entries_of_any_weight_died_or_were_born(recipe):
    report = report_of(recipe, 0, 5, stages=[], sparsity={"level": 0.75})
    weights = report.stage.plan.weights
    unchanged = {name: Change(0, w.active, w.active) for name, w in weights.items()}
    report.crossed(unchanged)
    assert report.log.said == [] and "mask" not in report.log.records
    name, last = list(weights.items())[-1]
    report.crossed(unchanged | {name: Change(7, last.active, last.active)})
    assert report.log.records["mask"]["moved"] == 7
    assert report.log.said == [
        f"step 5: static masks 7 of {report.stage.plan.active:,} entries from here on"]


def test_bytes_are_those_that_rank_0_holds_and_sends(recipe):
    report = report_of(recipe, 0, 1)
    report.engine.state_bytes = lambda: {"parameters": 2**20, "gradients": 3 * 2**19}
    report.engine.choices = "device CPU"
    report.bytes(SimpleNamespace(bytes={("all_reduce", "dp"): 2**20, ("send", "pp"): 2**21},
                                 total=3 * 2**20))
    assert report.log.records["bytes"] == {
        "step": 1, "parameters": 2**20, "gradients": 3 * 2**19, "sent_per_step": 3 * 2**20,
        "sent_by_kind": {"all_reduce dp": 2**20, "send pp": 2**21}, "choices": "device CPU"}
    assert report.log.said == [
        "rank 0 holds parameters 1.0 MiB, gradients 1.5 MiB; sends 3.0 MiB per step"]


def test_a_model_that_has_diverged_has_no_perplexity_and_other_ranks_say_nothing(recipe):
    report = report_of(recipe, 0, 5)
    report.data.valid_tokens_per_byte = None
    report.validation(Validation(1e4, None), better=True)
    assert report.log.records["valid"] == {"step": 5, "loss": 1e4, "perplexity": None}
    assert report.log.said == ["step 5: validation loss 10000.0000, no perplexity, since the model "
                               "has diverged"]
    other = report_of(recipe, 0, 5)
    other.log.active = False
    other.validation(Validation(1.0, None), better=True)
    assert other.log.said == [] and other.log.records == {}


def test_perplexity_and_bits():
    assert perplexity(0.0) == 1.0 and perplexity(2.0794415) == pytest.approx(8.0)
    assert perplexity(1e4) is None and perplexity(float("nan")) is None
    assert bits_per_byte(0.6931472, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(("stop_at", "loss"), [(None, 3.0), (2, None), (0, None)])
def test_validation_is_the_mean_over_its_batches_or_stops(stop_at, loss):
    asked, evaluated = [], []

    def evaluate(batch: float, stop: bool) -> tuple[float, bool]:
        evaluated.append(batch)
        return batch, stop

    def stop_requested() -> bool:
        asked.append(len(asked))
        return stop_at is not None and asked[-1] >= stop_at

    found = validation_loss(SimpleNamespace(evaluate=evaluate), [1.0, 2.0, 6.0], stop_requested)
    # the spread of 1, 2 and 6 is sqrt(7), over sqrt(3)
    assert found == (loss and (loss, pytest.approx(math.sqrt(7 / 3))))
    assert len(evaluated) == (3 if stop_at is None else stop_at + 1)
