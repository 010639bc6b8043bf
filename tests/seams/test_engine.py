"""An engine that lies outside the package, plain_engine.py, works wherever ours do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import plain_engine
import pytest
import yaml
from cases import cut, planned_traffic, train
from curves import close_runs
from harness import world_of
from user_command import run_with

from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.traffic import step_traffic
from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.load import make_recipe as load
from megatron_spdf.recipe.recipe import ENGINES
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.sparsity.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
PLAIN = {"engine": "plain", "parallel": {"zero_stage": 0}}
PLAIN_DP2 = {"engine": "plain", "parallel": {"data": 2, "zero_stage": 0}}
PLUGINS = "plain_engine"  # of the ranks


@pytest.mark.slow
@pytest.mark.parametrize("sections", [PLAIN, PLAIN_DP2], ids=str)
def test_losses_are_the_megatron_engines(ranks, make_recipe, sections):
    recipe = make_recipe(**sections)
    found = ranks(world_of(recipe)).run(train, recipe, steps=STEPS)
    reference = ranks(1).run(train, make_recipe(), steps=STEPS)
    close_runs(found, reference)
    assert found["masks"] == reference["masks"] and found["sparsity"] == reference["sparsity"]


@pytest.mark.slow
@pytest.mark.parametrize("sections", [PLAIN, PLAIN_DP2], ids=str)
def test_the_planner_knows_its_bytes(ranks, make_recipe, sections):
    recipe = make_recipe(**sections)
    there = ranks(world_of(recipe)).run(train, recipe, steps=STEPS)
    assert there["held"] == there["predicted"]


@pytest.mark.slow
def test_the_planner_knows_its_traffic(ranks, make_recipe):
    there = ranks(2).run(planned_traffic, make_recipe(**PLAIN_DP2))
    assert there["sent"] == there["predicted to be sent"] != {}


@pytest.fixture(scope="module")
def straight(ranks, make_recipe):
    return ranks(1).run(cut, [make_recipe(**PLAIN)], [STEPS])


@pytest.mark.slow
def test_resumed_twice_equals_straight_bit_for_bit(ranks, make_recipe, straight):
    assert ranks(1).run(cut, [make_recipe(**PLAIN)] * 3, [2, 3, STEPS]) == straight


@pytest.mark.slow
def test_a_run_goes_on_with_other_engines_and_back(ranks, make_recipe, straight):
    chain = [make_recipe(**sections) for sections in (
        PLAIN_DP2, {"parallel": {"tensor": 2}}, PLAIN_DP2,
        {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}})]
    losses = [loss for loss, _ in ranks(2).run(cut, chain, [1, 3, 4, STEPS])]
    assert losses == pytest.approx([loss for loss, _ in straight], rel=1e-5)


@pytest.mark.parametrize("sections, said", [
    ({"pipeline": 2}, "engine=plain has no pipeline stages here, and parallel.pipeline=2; set "
                      "pipeline=1 or engine=megatron"),
    ({"zero_stage": 1}, "parallel.zero_stage=1 needs engine=deepspeed or engine=megatron, and "
                        "engine=plain; change one of them"),
    ({"tensor": 2}, "parallel.tensor=2: engine=plain has whole weights on every rank"),
    ({"offload": True}, "parallel.offload=true needs engine=deepspeed, and engine=plain")])
def test_its_rules_are_sentences(recipe, sections, said):
    values = {"zero_stage": 0, **sections}
    broken = list(rule_violations(recipe(engine="plain", parallel=values,
                                         train={"precision": "fp32"})))
    assert [line for line in broken if said in line], broken


def test_its_recipe_breaks_no_rule(recipe):
    made = recipe(**PLAIN_DP2, train={"precision": "fp32"})
    assert not list(rule_violations(made))
    plan = Plan.of(made)
    held, sent = rank_bytes(made, plan, 0, on_gpu=True), step_traffic(made, plan, 0)
    assert held.gradients == held.parameters == sent["gradients", "all-reduce"]


def test_an_unknown_engine_gets_the_nearest_first(recipe):
    with pytest.raises(ValueError, match="engine='plane': there is no engine 'plane'; known: pla"):
        load(recipe().model_dump(), ["engine=plane"], "recipe.yaml")
    assert "deepspeed|megatron|plain = megatron" in render_help()
    assert ENGINES.get("plain").load() is plain_engine.PlainEngine


@pytest.mark.slow
def test_planning_imports_no_engine():
    code = ("import sys; from megatron_spdf.recipe.load import load_recipe; "
            "from megatron_spdf.planning.memory import rank_bytes; "
            "from megatron_spdf.sparsity.plan import Plan; "
            "r = load_recipe('configs/pretrain/demo.yaml'); rank_bytes(r, Plan.of(r), 0, True); "
            "print([m for m in ('torch', 'megatron.core', 'deepspeed') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={
        **os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


run = partial(run_with, plugins=PLUGINS)


@pytest.mark.slow
def test_it_is_planned_trained_and_measured_from_the_command_line(make_recipe, tmp_path):
    values = make_recipe(str(tmp_path / "run"), **PLAIN, log={"every": 1})
    values["train"] |= {"tokens": 8 * 32 * 5}
    values["optimizer"] |= {"warmup_tokens": 256}
    values["checkpoint"] = {"every": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = run(tmp_path, "pretrain.py", "recipe.yaml", plugins="")
    assert refused.returncode and "there is no engine 'plain'; known: " in refused.stderr
    assert not (tmp_path / "run").exists()
    planned = run(tmp_path, "tools/plan.py", "recipe.yaml", "--gpus", "1", "--gpu", "a100",
                  "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["own_layout"]["fits"]
    done = run(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "plain ZeRO-0" in done.stdout and "optimizer torch.AdamW fused" in done.stdout
    measured = run(tmp_path, "tools/benchmark.py", "step", "recipe.yaml", "--steps", "2")
    assert measured.returncode == 0, measured.stderr
    assert "optimizer, with norm and clipping" in measured.stdout
