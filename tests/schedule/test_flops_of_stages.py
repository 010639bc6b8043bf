"""FLOPs of a run with stages are the integral over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.overview import Request, make_overview
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.schedule.flops import Ramp, schedule_flops, training_flops
from megatron_spdf.schedule.stages import mean_flops, stages_left, stages_of
from megatron_spdf.sparsity.plan import Plan

PRETRAIN = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
STAGES = [{"share": 0.7, "sparsity": 0.75}, {"share": 0.2, "sparsity": 0.0},
          {"share": 0.1, "sparsity": 0.0}]


def test_stages_make_up_the_run(recipe):
    run = recipe(stages=STAGES)
    stages = stages_of(run)
    assert [(p.first, p.last, p.as_single_run.steps, p.recipe.steps) for p in stages] == [
        (0, 7, 7, 10), (7, 9, 2, 10), (9, 10, 1, 10)]
    assert sum(p.tokens for p in stages) == run.steps * run.tokens_per_step
    assert all(p.as_single_run.stages == [] and p.recipe.stages == run.stages for p in stages)
    assert [[p.number for p in stages_left(stages, step)] for step in (0, 6, 7, 9, 10)] == [
        [1, 2, 3], [1, 2, 3], [2, 3], [3], [3]]


def test_the_schedule_of_a_stage_is_said(recipe):
    first, second, _ = stages_of(recipe(stages=[
        {**STAGES[0], "decay_share": 0.5, "decay": "minus_sqrt"},
        {**STAGES[1], "decay": "constant"}, STAGES[2]]))
    assert "then constant, over the last 50% minus_sqrt to 0.0001" in first.heading
    assert first.as_single_run.decay_tokens == 4 * 256  # of its own seven steps
    assert "tokens, then constant;" in second.heading
    assert second.as_single_run.decay_tokens == 0


def test_a_run_without_stages_is_one(recipe):
    run = recipe(sparsity=0.5)
    (stage,) = stages_of(run)
    assert stage.recipe is run and stage.as_single_run is run and stage.heading == ""
    assert (stage.first, stage.last, stage.flops_before) == (0, run.steps, 0.0)


def test_flops_are_the_integral(recipe):
    run = recipe(stages=STAGES)
    stages, length = stages_of(run), run.train.sequence_length
    by_schedule = schedule_flops(run.model, length, [Ramp(0.7, 0.75, 0.75), Ramp(0.3, 0.0, 0.0)])
    assert mean_flops(stages).total == pytest.approx(by_schedule.total)
    dense = training_flops(run.model, length).total
    spent = stages[-1].flops_before + dense * stages[-1].tokens
    assert spent == pytest.approx(by_schedule.total * run.steps * run.tokens_per_step)


def test_the_published_run_saves_what_is_published():
    # V-SPDF at 6.7B parameters: 90% for 133B tokens (20 a parameter, as the dense model it is held
    # against), then dense for 20B, with about 65% fewer FLOPs.
    word = "stages=[{share: 0.8693, sparsity: 0.9}, {share: 0.1307, sparsity: 0}]"
    run = load_recipe(PRETRAIN / "gpt3_6b7_s90.yaml", ["sparsity=0", "train.tokens=153B", word])
    dense = training_flops(run.model, run.train.sequence_length).total * 133
    assert 1.0 - mean_flops(stages_of(run)).total * 153 / dense == pytest.approx(0.65, abs=0.015)


def test_the_planner_counts_all_stages(recipe):
    run = recipe(stages=STAGES)
    facts = make_overview(Request(run, Plan.of(run), GPUS["h100"], 1, 0.5, "given"))
    rows = {row["what"]: row for row in facts["flops"]}
    active = rows["training, active weights"]["total"]
    assert active == pytest.approx(mean_flops(stages_of(run)).total)
    assert active < rows["training, dense"]["total"]
    assert len(facts["model"]["stages"]) == 3 and "densified" in facts["model"]["stages"][1]


def test_headings_of_stages(recipe):
    run = recipe(stages=[{"share": 0.5, "sparsity": 0.75, "warmup_tokens": 256},
                         {"share": 0.3, "sparsity": 0.9, "lr": 2e-3, "min_lr_ratio": 0.25},
                         {"share": 0.2, "sparsity": 0.0, "decay": "constant"}],
                 optimizer={"lr": 1e-3, "min_lr_ratio": 0.1})
    flops = [stage.flops().total * stage.tokens for stage in stages_of(run)]
    assert [stage.heading for stage in stages_of(run)] == [
        f"stage 1 of 3: steps 1 to 5, 1,280 tokens, {flops[0]:.4g} FLOPs; learning rate up to 0.001"
        " over 256 tokens, then cosine to 0.0001",
        f"stage 2 of 3: steps 6 to 8, 768 tokens, {flops[1]:.4g} FLOPs; learning rate up to 0.002 "
        "over 0 tokens, then cosine to 0.0005; pruned by magnitude, with fresh optimizer moments",
        f"stage 3 of 3: steps 9 to 10, 512 tokens, {flops[2]:.4g} FLOPs; learning rate up to 0.001 "
        "over 0 tokens, then constant; densified, with fresh optimizer moments"]


def test_parts_of_a_stage_that_is_pruned(recipe):
    """Each stores as much as is kept at its end; its FLOPs are at the mean density of its steps."""
    run = recipe(sparsity={"level": 0.8, "algorithm": "gmp", "update": {"every": 1, "stores": 3}},
                 train={"tokens": 256 * 40})
    parts, algorithm = stages_of(run), run.sparsity.update
    assert [p.first for p in parts] == [0, *(p.last for p in parts[:-1])] and parts[-1].last == 40
    assert {(p.begin, p.end, p.steps) for p in parts} == {(0, 40, 40)}
    assert [p.continues for p in parts] == [False] + [True] * (len(parts) - 1)
    spent = 0.0
    for part in parts:
        kind = f"stored at {part.plan.sparsity:.2%} sparsity" if part.plan.weights else (
            "stored dense")
        assert part.heading == (f"stage {part.number} of {len(parts)}: steps {part.first + 1} to "
                                f"{part.last}, {part.tokens:,} tokens; weights {kind}")
        steps = range(part.first + 1, part.last + 1)
        mean = 0.8 * sum(algorithm.share(step, 40) for step in steps) / len(steps)
        assert part.mean_plan.sparsity == pytest.approx(mean, abs=1e-3)
        assert part.flops_before == pytest.approx(spent)
        spent += training_flops(run.model, 32, part.mean_plan).total * part.tokens
        assert part.as_single_run is part.recipe
    later = stages_of(recipe(stages=STAGES))[1]
    assert later.as_single_run.train.tokens == 2 * 256 and not later.continues
    assert mean_flops(parts).total == pytest.approx(spent / (40 * 256))
    causal = mean_flops(parts, "causal")
    assert causal.attention == training_flops(run.model, 32, None, "causal").attention
    assert causal.linear == mean_flops(parts).linear


def test_a_later_stage_is_pruned_by_its_own_steps(recipe):
    """Its parts are those of a run of its length, later, and so are their mean densities."""
    pruned = {"level": 0.8, "algorithm": "gmp", "update": {"every": 1, "stores": 3}}
    alone = stages_of(recipe(sparsity=pruned, train={"tokens": 256 * 40}))
    first, *later = stages_of(recipe(train={"tokens": 256 * 50}, stages=[
        {"share": 0.2, "sparsity": 0.0}, {"share": 0.8, "sparsity": pruned}]))
    assert (first.first, first.last, first.mean_plan.sparsity) == (0, 10, 0.0)
    assert [(p.first - 10, p.last - 10, p.begin - 10) for p in later] == [
        (p.first, p.last, p.begin) for p in alone]
    for part, own in zip(later, alone, strict=True):
        assert part.mean_plan.sparsity == own.mean_plan.sparsity
        assert part.flops_before - first.flops().total * first.tokens == pytest.approx(
            own.flops_before)
