"""A pattern that lies outside the package, diagonal_pattern.py, works wherever ours do."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from cases import against_plain, cut, train
from diagonal_pattern import Diagonal
from harness import world_of
from user_command import run_with

from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.planning.step_time import step_time
from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.load import load_recipe, make_recipe, save_recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.sparsity.plan import Plan, SparseWeight, render_plan

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
BANDS = {"level": 0.75, "pattern": "diagonal", "slope": 3}
DEEPSPEED = {"engine": "deepspeed"}
LAYOUTS = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "zero 1": {"parallel": {"data": 2, "zero_stage": 1}},
    "deepspeed tp2": DEEPSPEED | {"parallel": {"tensor": 2}},
    "deepspeed zero 1": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 1}},
    "deepspeed zero 2": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 2}},
    "deepspeed zero 3": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 3}},
}
CHAINS = {"over layouts": ["tp2", "zero 1", "pp2"],
          "over engines": ["tp2", "deepspeed zero 3", "zero 1"]}


PLUGINS = "diagonal_pattern"  # of the ranks


@pytest.fixture(scope="module")
def run(ranks, make_recipe):
    """What each rank gives of a run with these sections."""
    def trained(sections: dict) -> list[dict]:
        recipe = make_recipe(sparsity=BANDS, **sections)
        return ranks(world_of(recipe)).run_all(train, recipe, steps=STEPS)
    return trained


def close(found: list, wanted: list) -> None:
    for (loss, norm), (loss_wanted, norm_wanted) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(loss_wanted, abs=1e-5)
        assert norm == pytest.approx(norm_wanted, rel=1e-4)  # a root of a sum over all weights


@pytest.mark.slow
@pytest.mark.parametrize("sections", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_and_masks_are_those_of_one_process(run, sections):
    (one,) = run({})
    for there in run(sections):
        close(there["curve"], one["curve"])
        assert all(one["masks"][slice] == mask for slice, mask in there["masks"].items())
        assert there["sparsity"] == pytest.approx(dict.fromkeys(there["sparsity"], 0.75))


@pytest.mark.slow
@pytest.mark.parametrize("layouts", CHAINS.values(), ids=CHAINS)
def test_a_run_goes_on_at_another_layout(ranks, make_recipe, run, layouts):
    chain = [make_recipe(sparsity=BANDS, **LAYOUTS[layout]) for layout in layouts]
    close(ranks(2).run(cut, chain, [1, 3, STEPS]), run({})[0]["curve"])


@pytest.mark.slow
def test_training_equals_plain_pytorch_on_masked_dense_weights(ranks, make_recipe):
    there = ranks(1).run(against_plain, make_recipe(sparsity=BANDS), steps=STEPS)
    close(there["engine"], there["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_multiply_by_its_product_but_under_zero_3(run, name):
    there = run(LAYOUTS[name])[0]
    if name == "deepspeed zero 3":
        assert there["products"] == {"NoneType"}
    else:
        assert there["products"] == {"DiagonalProduct"}
        assert "; bands entry by entry" in there["choices"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "pp2", "zero 1"])
def test_the_planner_knows_its_bytes(run, name):
    there = run(LAYOUTS[name])[0]
    assert there["held"] == there["predicted"]


def test_a_recipe_is_read_and_written_with_its_keys(recipe, tmp_path):
    made = recipe(sparsity=BANDS)
    assert made.sparsity.slope == 3 and not list(rule_violations(made))
    save_recipe(made, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == made
    identity = made.identity()["sparsity"]
    assert identity["slope"] == 3 and identity != recipe(sparsity=BANDS | {"slope": 2}).identity()
    assert "  sparsity.slope " in render_help() and "|diagonal|" in render_help()


@pytest.mark.parametrize("words, said", [
    (["sparsity.pattern=diagnoal"], "there is no pattern 'diagnoal'; known: diagonal, "),
    (["sparsity.slop=2"], "did you mean sparsity.slope?"),
    (["sparsity.slope=-1"], "sparsity.slope=-1: input should be greater than or equal to 0"),
    (["sparsity.level=0.999"], "level=0.999 leaves no entry of a row; take a lower level")])
def test_bad_input_is_named(recipe, words, said):
    with pytest.raises(ValueError) as error:
        make_recipe(recipe(sparsity=BANDS).model_dump(), words, "recipe.yaml")
    assert said in str(error.value)


def test_keys_of_another_pattern_wait(recipe):
    values = recipe(sparsity=BANDS).model_dump()
    changed = make_recipe(values, ["sparsity.pattern=unstructured"], "recipe.yaml")
    assert changed.identity() == recipe(sparsity=0.75).identity()


def test_the_plan_counts_what_is_active(recipe):
    bands, entries = (recipe(sparsity=s) for s in (BANDS, 0.75))
    plan = Plan.of(bands)
    assert plan.sparsity == 0.75 and plan.skipped.weights == plan.weights
    assert "; bands, 3 entries apart from row to row" in render_plan(plan)
    from megatron_spdf.planning.hardware import GPUS

    gpu = next(iter(GPUS.values()))
    fast, slow = (step_time(r, Plan.of(r), gpu) for r in (bands, entries))
    assert fast.compute < slow.compute


@pytest.mark.parametrize("axis", [0, 1])
def test_masks_of_another_pattern_are_refused(axis):
    weight = SparseWeight("w", (8, 16), axis, 2, 0.5, Diagonal(slope=1))
    compact = CompactWeight(weight, 0, 0, 1, "cpu")
    masks = np.stack([weight.draw(0, c) for c in range(2)])
    assert weight.fault(masks) is None
    largest = weight.largest(np.random.default_rng(0).normal(size=masks.shape[1]))
    assert weight.fault(largest[None]) is None
    compact.mask_bits.copy_(compact.mask_bits.flip(1))
    with pytest.raises(ValueError, match="the masks of w are not bands; use another checkpoint"):
        compact.index_mask()


command = partial(run_with, plugins=PLUGINS)


@pytest.mark.slow
def test_it_is_planned_trained_and_inspected_from_the_command_line(make_recipe, tmp_path):
    values = make_recipe(str(tmp_path / "run"), sparsity=BANDS, log={"every": 1})
    values["train"] |= {"tokens": 8 * 32 * 4}
    values["optimizer"]["warmup_tokens"] = 256
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = command(tmp_path, "pretrain.py", "recipe.yaml", plugins="")
    assert refused.returncode and "there is no pattern 'diagonal'; known: " in refused.stderr
    assert not (tmp_path / "run").exists()
    done = command(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "; bands entry by entry" in done.stdout and "sparsity 75.00%" in done.stdout
    looked = command(tmp_path, "tools/inspect_checkpoint.py", "run", "--verify", "--json")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["state"]["step"] == 4
    planned = command(tmp_path, "tools/plan.py", "recipe.yaml", "--gpu", "h100", "--json")
    assert planned.returncode == 0, planned.stderr
    (own,) = [row for row in json.loads(planned.stdout)["sparsity"] if row["recipe"]]
    assert own["skips_zeros"] and own["sparsity"] == 0.75
