"""Invariants 1 and 2 while masks move: layouts change neither masks nor losses, and a run resumes
on either side of a move. The algorithm, wander.py, lies outside the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import ChainMap
from pathlib import Path

import numpy as np
import pytest
import wander  # noqa: F401
import yaml
from harness import outcome, run_cases

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EVERY, STEPS = 3, 12
WANDER = {"level": 0.75, "algorithm": "wander", "update": {"every": EVERY, "stop": 1.0}}
DEEPSPEED = {"engine": "deepspeed"}
LAYOUTS = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2 interleaved": {"parallel": {"pipeline": 2, "interleave": 2}},
    "zero 0": {"parallel": {"data": 2, "zero_stage": 0}},
    "zero 1": {"parallel": {"data": 2}},
    "deepspeed zero 0": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 0}},
    "deepspeed zero 1": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 1}},
    "deepspeed zero 2": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 2}},
    "deepspeed zero 3": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 3}},
    "deepspeed tp2": DEEPSPEED | {"parallel": {"tensor": 2, "zero_stage": 1}},
    "offloaded": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 2, "offload": True}},
    "recompute": {"parallel": {"data": 2}, "train": {"recompute": "full"}},
}
BF16 = {name: sections | {"train": {"precision": "bf16"}} for name, sections in LAYOUTS.items()
        if "zero" in name}
# Layouts before and after a stop: one step before a move, at it, and one step after it.
RESUMED = {"at 5": ("zero 1", "tp2"), "at 6": ("tp2", "pp2"), "at 7": ("pp2", "zero 0"),
           "deepspeed 5": ("deepspeed zero 3", "deepspeed zero 1"),
           "deepspeed 6": ("zero 1", "deepspeed zero 3"),
           "deepspeed 7": ("deepspeed zero 2", "tp2")}
# Layouts for an algorithm that needs the gradient of the dense weights.
BY_GRADIENT = {"level": 0.75, "algorithm": "by_gradient",
               "update": {"every": EVERY, "fraction": 0.1, "stop": 1.0}}
GRADIENTS = ["tp2", "tp2 sp", "pp2 interleaved", "zero 0", "zero 1", "deepspeed zero 0",
             "deepspeed zero 1", "deepspeed zero 2", "deepspeed zero 3", "recompute"]
SAME = ["zero 1", "deepspeed zero 2"]  # layouts at which a run goes on bit for bit


@pytest.fixture(scope="module")
def results(make_deep_recipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("wander")

    def recipe(sections: dict, output: str | None = None, sparsity: object = WANDER) -> dict:
        sections = {**sections, "train": {"tokens": 8 * 32 * STEPS, **sections.get("train", {})}}
        return make_deep_recipe(output and str(place / output), sparsity=sparsity,
                                checkpoint={"asynchronous": False}, log={"every": 1}, **sections)

    def trained(sections: dict, before: str | None = None, **keywords) -> tuple:
        own = {key: keywords.pop(key) for key in ("output", "sparsity") if key in keywords}
        return ("mask_cases.trained", {"recipe": recipe(sections, **own), **keywords},
                [before] if before else [])

    one = {"one": trained({}), "plain": ("mask_cases.plain", {"recipe": recipe({})}),
           "sgd": trained({"optimizer": {"name": "sgd", "lr": 0.5}})}
    two = {name: trained(sections) for name, sections in LAYOUTS.items()}
    two |= {f"{name} bf16": trained(sections) for name, sections in BF16.items()}
    one["by gradient plain"] = ("mask_cases.plain", {"recipe": recipe({}, sparsity=BY_GRADIENT)})
    one["by gradient one"] = trained({}, sparsity=BY_GRADIENT)
    two |= {f"by gradient {name}": trained(LAYOUTS[name], sparsity=BY_GRADIENT)
            for name in GRADIENTS}
    two["by gradient per layer"] = trained(
        LAYOUTS["tp2 sp"], sparsity=BY_GRADIENT | {"dense_copy": "per_layer"})
    two["by gradient still"] = trained(LAYOUTS["zero 1"], sparsity={
        **BY_GRADIENT, "update": {"every": EVERY, "fraction": 0.0}})
    two["overlapped"] = trained(LAYOUTS["zero 1"], overlap=True)
    two["sgd zero 1"] = trained({**LAYOUTS["zero 1"], "optimizer": {"name": "sgd", "lr": 0.5}})
    two["skipped"] = trained(LAYOUTS["zero 1"], skip=6)
    for name in SAME:
        still = {**WANDER, "update": {"every": EVERY, "fraction": 0.0}}
        two[f"{name} still"] = trained(LAYOUTS[name], sparsity=still)
        two[f"{name} static"] = trained(LAYOUTS[name], sparsity=0.75)
        for part, stop in enumerate((6, 7, None)):
            two[f"{name} part {part}"] = trained(
                LAYOUTS[name], f"{name} part {part - 1}" if part else None, output=name, stop=stop)
    for name, layouts in RESUMED.items():
        for part, layout in enumerate(layouts):
            two[f"{name} part {part}"] = trained(
                LAYOUTS[layout], f"{name} part 0" if part else None, output=name,
                stop=None if part else int(name[-1]))
    return ChainMap(run_cases(1, one, place / "1"), run_cases(2, two, place / "2"))


def close(losses: list[float], reference: list[float]) -> None:
    assert losses == pytest.approx(reference, abs=1e-5)


def test_losses_are_those_of_plain_pytorch_with_masks_that_move(results):
    close(outcome(results, "one")["losses"], outcome(results, "plain")["losses"])


@pytest.mark.parametrize("name", [*LAYOUTS, "overlapped"])
def test_losses_and_masks_are_the_same_at_every_layout(results, name):
    one = outcome(results, "one")
    close(outcome(results, name)["losses"], one["losses"])
    held = {key: mask for rank in range(2) for key, mask in
            outcome(results, name, rank)["masks"].items()}
    assert held == one["masks"]


@pytest.mark.parametrize("name", BF16)
def test_masks_move_alike_in_bf16(results, name):
    assert outcome(results, f"{name} bf16")["masks"] == outcome(results, "one")["masks"]


@pytest.mark.parametrize("name", ["one", *GRADIENTS, "per layer"])
def test_the_dense_gradient_is_that_of_the_whole_batch(results, name):
    """Entries within rounding of the last that dies or is born may go the other way."""
    plain = outcome(results, "by gradient plain")
    ranks = [outcome(results, f"by gradient {name}", rank) for rank in
             range(len(results[f"by gradient {name}"]))]
    close(ranks[0]["losses"], plain["losses"])
    active = {key: mask for rank in ranks for key, mask in rank["active"].items()}
    apart = sum(int((mask & ~active[key]).sum()) for key, mask in plain["active"].items())
    assert apart <= 1e-3 * sum(move["moved"] for move in ranks[0]["moves"])
    assert len(active) == len(plain["active"]) and len(ranks[0]["moves"]) == 3


def test_collecting_the_gradient_changes_no_digit(results):
    assert (outcome(results, "by gradient still")["losses"]
            == outcome(results, "zero 1 static")["losses"])


def test_every_move_is_in_the_log_and_in_the_checkpoint(results):
    one = outcome(results, "one")
    assert [(r["step"], r["update"]) for r in one["moves"]] == [(3, 1), (6, 2), (9, 3)]
    assert all(r["share"] == pytest.approx(0.1, abs=1e-3) for r in one["moves"])
    assert one["run"]["masks"] == {"kind": "moved", "how": "random, seed 0",
                                   "algorithm": "wander", "updates": 3}
    assert one["run"]["state"]["mask_updates"] == 3
    for found in one["run"]["sparsity"].values():
        assert found["measured"] == pytest.approx(found["target"], abs=1e-9)


@pytest.mark.parametrize("name", SAME)
def test_nothing_moves_with_fraction_zero(results, name):
    still, static = outcome(results, f"{name} still"), outcome(results, f"{name} static")
    assert (still["losses"], still["masks"]) == (static["losses"], static["masks"])
    assert still["losses"] != outcome(results, name)["losses"]


@pytest.mark.parametrize("name", SAME)
def test_a_run_stopped_at_a_move_and_after_it_goes_on_bit_for_bit(results, name):
    parts = [outcome(results, f"{name} part {part}") for part in range(3)]
    assert sum((part["losses"] for part in parts), []) == outcome(results, name)["losses"]
    assert parts[-1]["masks"] == outcome(results, name)["masks"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_stopped_around_a_move_goes_on_at_another_layout(results, name):
    first, second = (outcome(results, f"{name} part {part}") for part in range(2))
    assert len(first["losses"]) == int(name[-1])
    close(first["losses"] + second["losses"], outcome(results, "one")["losses"])
    held = {key: mask for rank in range(2)
            for key, mask in outcome(results, f"{name} part 1", rank)["masks"].items()}
    assert held == outcome(results, "one")["masks"]


def test_a_skipped_step_moves_nothing(results):
    found = outcome(results, "skipped")
    # One of the steps is not counted: later moves come a step later.
    assert [r["step"] for r in found["moves"]] == [3, 7, 10]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "zero" in name])
def test_the_planner_knows_what_a_move_sends(results, name):
    found = outcome(results, name)
    assert len(found["sent"]) == found["predicted"].count == 3
    exact = 0.1 if name == "deepspeed zero 3" else 1e-9  # which keeps some weights whole
    assert found["sent"] == [pytest.approx(found["predicted"].carried, rel=exact)] * 3
    found = outcome(results, f"by gradient {name}")
    predicted = found["predicted"].carried + found["predicted"].reduced
    assert found["sent"] == [pytest.approx(predicted, rel=exact)] * 3


def test_the_state_of_another_optimizer_moves_too(results):
    close(outcome(results, "sgd zero 1")["losses"], outcome(results, "sgd")["losses"])
    assert outcome(results, "sgd zero 1")["masks"] == outcome(results, "one")["masks"]


def run(place: Path, script: str, *words: str, plugins: str = "wander"):
    """A command of the project, as a user starts it who has the tenant's directory on the path."""
    path = os.pathsep.join(map(str, (Path(__file__).parent, ROOT)))
    env = {**os.environ, "SPDF_PLUGINS": plugins, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore",
           "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(ROOT / script), *words], cwd=place, env=env,
                          capture_output=True, text=True, check=False, timeout=600)


def test_it_is_planned_trained_and_inspected_from_the_command_line(make_recipe, tmp_path):
    values = make_recipe(str(tmp_path / "run"), sparsity=WANDER)
    values["train"] |= {"tokens": 8 * 32 * 5}
    values["optimizer"]["warmup_tokens"] = 256
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = run(tmp_path, "pretrain.py", "recipe.yaml", plugins="")
    assert refused.returncode == 2
    assert "there is no mask algorithm 'wander'; known: static" in refused.stderr
    assert not (tmp_path / "run").exists()
    says = ("mask algorithm wander: at random, 0.1 of the active entries of each slice every 3 "
            "steps, from 0% to 100% of the steps; 1 moves in 5 steps")
    planned = run(tmp_path, "tools/plan.py", "recipe.yaml", "--gpu", "h100", "--gpus", "1")
    assert says in planned.stdout, planned.stderr
    done = run(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and "step 3: wander moved" in done.stdout
    looked = run(tmp_path, "tools/inspect_checkpoint.py", "run", "--verify")
    assert looked.returncode == 0, looked.stderr
    assert "masks random, seed 0, moved 1 times by wander" in looked.stdout
    other = run(tmp_path, "tools/convert_checkpoint.py", "reshard", "run", "two",
                "parallel.tensor=2")
    assert other.returncode == 0, other.stderr
    facts = [json.loads(run(tmp_path, "tools/inspect_checkpoint.py", where, "--verify",
                            "--json").stdout) for where in ("run", "two")]
    assert facts[0]["sparsity"] == facts[1]["sparsity"]


def test_moved_masks_are_kept_by_what_goes_on_from_them(make_recipe, tmp_path):
    """Fine-tuning, resumed once, takes them as they are; so does densifying."""
    values = make_recipe(str(tmp_path / "run"), sparsity=WANDER)
    values["train"] |= {"tokens": 8 * 32 * 5}
    values["optimizer"]["warmup_tokens"] = 256
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        lines = [json.dumps({"context": word, "completion": word[::-1]}) for word in ("ab", "cd")]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({
        "checkpoint": "run", "output": "tuned", "mode": "sparse", "engine": "megatron",
        "data": {"task": "jsonl", "path": "data"}, "optimizer": {"lr": 1e-3},
        "train": {"epochs": 2, "global_batch": 2, "micro_batch": 1, "precision": "fp32"}}))
    for words in (("pretrain.py", "recipe.yaml"), ("finetune.py", "tune.yaml"),
                  ("finetune.py", "tune.yaml"),
                  ("tools/convert_checkpoint.py", "densify", "run", "dense"),
                  ("tools/inspect_checkpoint.py", "tuned", "--verify")):
        done = run(tmp_path, *words)
        assert done.returncode == 0, (words, done.stderr)
    moved, tuned, dense = (CheckpointReader(find_checkpoint(tmp_path / name))
                           for name in ("run", "tuned", "dense"))
    assert moved.masks == tuned.masks and moved.masks["kind"] == "moved"
    assert tuned.recipe.sparsity.algorithm == dense.recipe.sparsity.algorithm == "static"
    for name, weight in moved.plan.weights.items():
        assert (moved.mask_bits(name) == tuned.mask_bits(name)).all()
        assert (dense.master(name) == moved.master(name)).all()
        drawn = np.stack([weight.draw(0, c) for c in range(weight.slices)])
        assert (np.packbits(drawn, axis=1) != moved.mask_bits(name)).any()


def test_a_stage_has_an_algorithm_of_its_own(make_recipe, tmp_path):
    values = make_recipe(str(tmp_path / "run"), log={"every": 1})
    values["train"] |= {"tokens": 8 * 32 * 16}
    values["optimizer"]["warmup_tokens"] = 256
    del values["sparsity"]
    values["stages"] = [{"share": 0.5, "sparsity": WANDER}, {"share": 0.5, "sparsity": 0}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = run(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "2 moves in 8 steps" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "mask"] == [3, 6]
    assert {r["sparsity"] for r in records if r["kind"] == "train" and r["step"] > 8} == {0.0}
