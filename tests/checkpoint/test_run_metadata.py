"""What run.json says of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from megatron_spdf.checkpoint.run_metadata import (
    RunState,
    after_moves,
    describe_masks,
    read_run_record,
    run_record,
    seeded_masks,
    stored_masks,
)
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.version import __version__

STATE = RunState(9, 7, 2, 1, 8, 4, 1.5, 3, 1234, 5)


@pytest.fixture
def record(recipe):
    made = recipe(sparsity={"level": 0.75, "seed": 11,
                            "rules": [{"weights": "*.mlp.*", "level": 0.5}]})
    plan = Plan.of(made)
    measured = {name: 0.25 + number / 1000 for number, name in enumerate(plan.weights)}
    tokenizer = SimpleNamespace(kind="tokenizers", sha256="abc")
    return made, plan, measured, run_record(made, plan, tokenizer, stored_masks("given"), "there",
                                            asdict(STATE), measured)


def test_a_record_has_all_that_a_run_is_gone_on_with(record, tmp_path):
    made, plan, measured, found = record
    before = datetime.now().astimezone()
    assert datetime.strptime(found.pop("saved"), "%Y-%m-%dT%H:%M:%S%z") <= before
    assert found == {
        "state": {"step": 9, "optimizer_steps": 7, "skipped": 2, "skipped_in_a_row": 1,
                  "evaluated": 8, "best_step": 4, "best_loss": 1.5, "worse": 3, "tokens": 1234,
                  "mask_updates": 5},
        "tokens": 1234, "recipe": made.model_dump(),
        "tokenizer": {"kind": "tokenizers", "sha256": "abc"},
        "masks": {"kind": "stored", "how": "given", "algorithm": "static", "updates": 0},
        "origin": "there",
        "sparsity": {name: {"target": 0.5 if ".mlp." in name else 0.75, "measured": measured[name]}
                     for name in plan.weights},
        "versions": {"megatron_spdf": __version__, "torch": version("torch"),
                     "megatron-core": version("megatron-core")}}


def test_a_record_is_read_as_it_was_written(record, tmp_path):
    *_, found = record
    (tmp_path / "run.json").write_text(json.dumps(found))
    read = read_run_record(tmp_path / "run.json")
    assert read == json.loads(json.dumps(found))
    assert RunState(**read["state"]) == STATE
    assert Recipe.model_validate(read["recipe"]) == record[0]


@pytest.mark.parametrize(("change", "said"), [
    ({"state": {"step": -1}}, "step"), ({"state": {"epoch": 3}}, "epoch"),
    ({"recipe": {"output": "x"}}, "recipe")], ids=str)
def test_what_describes_no_run_is_refused(record, tmp_path, change, said):
    *_, found = record
    (tmp_path / "run.json").write_text(json.dumps(found | change))
    with pytest.raises(ValueError, match=rf"run\.json: .*{said}"):
        read_run_record(tmp_path / "run.json")


def test_masks_are_what_they_were_made_of_and_moved_by(recipe):
    plan = Plan.of(recipe(sparsity={"level": 0.75, "seed": 11}))
    seeded = seeded_masks(plan)
    assert seeded == {"kind": "seeded", "how": "random, seed 11", "algorithm": "static",
                      "updates": 0}
    assert after_moves(seeded, "set", 0) == seeded | {"algorithm": "set"}
    moved = after_moves(seeded, "set", 1200)
    assert moved == seeded | {"kind": "moved", "algorithm": "set", "updates": 1200}
    # a later part of the run, in which masks stay, says who moved them last
    assert after_moves(moved, "static", 0) == moved
    assert after_moves(moved, "rigl", 1300) == moved | {"algorithm": "rigl", "updates": 1300}
    assert describe_masks(seeded) == "random, seed 11"
    assert describe_masks(after_moves(seeded, "set", 0)) == "random, seed 11"
    assert describe_masks(moved) == "random, seed 11, moved 1,200 times by set"
