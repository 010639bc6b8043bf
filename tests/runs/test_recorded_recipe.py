"""Runs of before there was a key for the width of the base model's heads mean what they meant."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from megatron_spdf.checkpoint.run_metadata import RunState, read_run_record
from megatron_spdf.model.parametrization import Parametrization
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.measured import read_run
from megatron_spdf.runs.run_dir import RECIPE, RunDir
from megatron_spdf.sparsity.plan import Plan

STEP = {"kind": "train", "step": 1, "tokens": 32, "loss": 5.0}


@pytest.fixture
def kept(recipe, tmp_path):
    """A run directory whose recipe and record lack the key."""
    values = recipe(parametrization="mup", mup_base={"hidden": 32}).model_dump()
    del values["mup_base"]["head_width"]
    root = tmp_path / "run"
    root.mkdir()
    (root / RECIPE).write_text(yaml.safe_dump(values))
    (root / "run.json").write_text(json.dumps({
        "state": vars(RunState(step=1)), "tokens": 32, "recipe": values, "sparsity": {},
        "tokenizer": {"kind": "gpt2", "sha256": "0"}, "versions": {}, "saved": ""}))
    (root / "log.jsonl").write_text(json.dumps(STEP) + "\n")
    return root


def scale_of(recipe: Recipe) -> float:
    return Parametrization(recipe, Plan.of(recipe)).attention_scale


def test_scores_were_divided_by_the_width_of_a_head(kept):
    read = Recipe.model_validate(read_run_record(kept / "run.json")["recipe"])
    for found in (read, read_run(kept).recipe):
        assert scale_of(found) == pytest.approx(1 / 16)
        assert found.mup_base.hidden == 32


def test_such_a_run_goes_on_with_its_own_scale_only(kept, recipe):
    def start(**base) -> None:
        RunDir(recipe(parametrization="mup", mup_base={"hidden": 32, **base})).check()

    with pytest.raises(ValueError, match="mup_base.head_width is 1 there and None here"):
        start()
    start(head_width=1)


def test_a_run_of_today_keeps_what_it_says(recipe, tmp_path):
    for base in ({}, {"head_width": 4}):
        made = recipe(parametrization="mup", mup_base=base, output=str(tmp_path / f"{base}"))
        RunDir(made).create()
        RunDir(made).check()
        assert scale_of(made) == pytest.approx(math.sqrt(base.get("head_width", 16)) / 16)
