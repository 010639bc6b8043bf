"""Invariants 1 and 2 while masks move: layouts change neither masks nor losses, and a run resumes
on either side of a move. The algorithm, wander.py, lies outside the package."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import yaml
from cases import overlapped
from harness import world_of
from mask_cases import plain, trained
from user_command import run_with

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint

pytestmark = pytest.mark.slow

EVERY, STEPS = 3, 12
# What is born has a step count of its own: the state that moves holds ages too.
WANDER = {"level": 0.75, "algorithm": "wander",
          "update": {"every": EVERY, "stop": 1.0, "newborn": "ages",
                     "track_ages": True}}
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
# Layouts for an algorithm that needs the gradient of the dense weights.
RIGL = {"level": 0.75, "algorithm": "rigl",
        "update": {"every": EVERY, "fraction": 0.1, "stop": 1.0, "anneal": "constant",
                   "newborn": "plain"}}
GRADIENTS = ["tp2", "tp2 sp", "pp2", "pp2 interleaved", "zero 0", "zero 1", "deepspeed zero 0",
             "deepspeed zero 1", "deepspeed zero 2", "deepspeed zero 3", "recompute"]
SAME = ["zero 1", "deepspeed zero 2"]  # layouts at which a run goes on bit for bit
SGD = {"optimizer": {"name": "sgd", "lr": 0.5}}


@pytest.fixture(scope="module")
def recipe(make_deep_recipe):
    def make(sections: dict, output: str | None = None, sparsity: object = WANDER) -> dict:
        sections = {**sections, "train": {"tokens": 8 * 32 * STEPS, **sections.get("train", {})}}
        return make_deep_recipe(output, sparsity=sparsity, checkpoint={"asynchronous": False},
                                log={"every": 1}, **sections)
    return make


@pytest.fixture(scope="module")
def run(ranks, recipe):
    """What each rank gives of a run with these sections and sparsity."""
    def on_all(sections: dict, sparsity: object = WANDER) -> list[dict]:
        made = recipe(sections, sparsity=sparsity)
        return ranks(world_of(made)).run_all(trained, made)
    return on_all


@pytest.fixture(scope="module")
def one(run):
    return run({})[0]


def close(losses: list[float], reference: list[float]) -> None:
    assert losses == pytest.approx(reference, abs=1e-5)


def seen(found: dict) -> list[dict]:
    """What the log says of moves, without their seconds."""
    return [{key: value for key, value in move.items() if key != "seconds"}
            for move in found["moves"]]


def together(ranks: list[dict], what: str = "masks") -> dict:
    return {key: mask for there in ranks for key, mask in there[what].items()}


def differing(ranks: list[dict], reference: dict) -> int:
    """Entries that are active in a plain reference alone."""
    active = together(ranks, "active")
    assert len(active) == len(reference["active"])
    return sum(int((mask & ~active[key]).sum()) for key, mask in reference["active"].items())


def test_losses_are_those_of_plain_pytorch_with_masks_that_move(ranks, recipe, one):
    close(one["losses"], ranks(1).run(plain, recipe({}))["losses"])


@pytest.mark.parametrize("sections", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_and_masks_are_the_same_at_every_layout(run, one, sections):
    there = run(sections)
    close(there[0]["losses"], one["losses"])
    assert together(there) == one["masks"]
    assert seen(there[0]) == seen(one)


def test_overlapping_traffic_with_compute_changes_neither(ranks, recipe, one):
    there = ranks(2).run_all(overlapped, trained, recipe(LAYOUTS["zero 1"]))
    close(there[0]["losses"], one["losses"])
    assert together(there) == one["masks"]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "zero" in name])
def test_masks_move_alike_in_bf16(run, one, name):
    there = run(LAYOUTS[name] | {"train": {"precision": "bf16"}})[0]
    assert there["masks"] == one["masks"]


@pytest.mark.parametrize(("sections", "change"), [
    ({}, {}), *((LAYOUTS[name], {}) for name in GRADIENTS),
    (LAYOUTS["tp2 sp"], {"dense_copy": "per_layer"}), ({"train": {"micro_batch": 8}}, {}),
    ({"train": {"micro_batch": 2}}, {})],
    ids=["one", *GRADIENTS, "per layer", "one micro-batch", "four micro-batches"])
def test_the_dense_gradient_is_that_of_the_whole_batch(ranks, recipe, run, sections, change):
    """Entries within rounding of the last that dies or is born may go the other way."""
    reference = ranks(1).run(plain, recipe({}, sparsity=RIGL))
    there = run(sections, RIGL | change)
    close(there[0]["losses"], reference["losses"])
    assert differing(there, reference) <= 1e-3 * sum(m["moved"] for m in there[0]["moves"])
    assert len(there[0]["moves"]) == 3


@pytest.mark.parametrize(("name", "batch", "dense_copy"), [
    ("one", 4, "per_step"), ("tp2 sp", 4, "per_layer"), ("pp2 interleaved", 4, "per_step"),
    ("zero 1", 2, "per_step"), ("deepspeed zero 3", 2, "per_step")])
def test_the_last_micro_batch_alone_ranks_what_is_born(ranks, recipe, run, name, batch, dense_copy):
    """The last of every rank, summed up with its sign: together the second half of the batch."""
    lean = RIGL | {"update": RIGL["update"] | {"gradient": "micro_batch"}}
    reference = ranks(1).run(plain, recipe({"train": {"micro_batch": 4}}, sparsity=lean))
    there = run(LAYOUTS.get(name, {}) | {"train": {"micro_batch": batch}},
                lean | {"dense_copy": dense_copy})
    close(there[0]["losses"], reference["losses"])
    assert differing(there, reference) <= 1e-3 * sum(m["moved"] for m in there[0]["moves"])
    whole = ranks(1).run(plain, recipe({}, sparsity=RIGL))
    assert differing(there, whole) > 0.05 * sum(m["moved"] for m in there[0]["moves"])


@pytest.mark.parametrize("name", ["set", "rigl"])
@pytest.mark.parametrize("layout", ["tp2 sp", "pp2", "zero 1"])
def test_sixty_steps_with_a_move_every_five_are_the_same(run, layout, name):
    moving = {"level": 0.75, "algorithm": name, "update": {"every": 5}}
    long = {"train": {"tokens": 8 * 32 * 60}, "model": {"layers": 2}}
    # one micro-batch, since two send twice as often
    once = {"train": long["train"] | {"micro_batch": 8}} if layout == "tp2 sp" else {}
    there, reference = run(LAYOUTS[layout] | long | once, moving), run(long, moving)[0]
    close(there[0]["losses"], reference["losses"])
    assert [move["step"] for move in there[0]["moves"]] == list(range(5, 45, 5))
    if name == "set":  # gradients of RigL may be within rounding of each other
        assert together(there) == reference["masks"]


@pytest.mark.parametrize(("newborn", "beta2", "names"), [
    ("ages", 0.999, ["tp2", "zero 1", "deepspeed zero 2"]), ("ramp", 0.95, ["zero 1"])])
def test_what_is_born_has_a_step_count_of_its_own(ranks, recipe, run, newborn, beta2, names):
    """As in Adam with a count for every value, over forty steps and nine moves."""
    keys = {"every": 4, "fraction": 0.3, "stop": 1.0, "newborn": newborn}
    moving = WANDER | {"update": keys | ({"ramp": 6} if newborn == "ramp" else {})}
    long = {"train": {"tokens": 8 * 32 * 40}, "optimizer": {"beta2": beta2}}
    reference = ranks(1).run(plain, recipe(long, sparsity=moving))["losses"]
    for there in (run(LAYOUTS[name] | long, moving)[0] for name in names):
        close(there["losses"], reference)
    as_all = run(long, moving | {"update": keys | {"newborn": "plain"}})[0]["losses"]
    assert max(abs(a - b) for a, b in zip(as_all, reference, strict=True)) > 3e-4


@pytest.mark.parametrize("name", ["tp2", "zero 1", "deepspeed zero 1", "deepspeed zero 3"])
def test_ages_take_the_bytes_that_are_planned(run, name):
    counted, planned = run(LAYOUTS[name])[0]["optimizer"]
    assert counted == pytest.approx(planned, rel=0.01 if "deepspeed" in name else 0.0)
    assert planned > 1.4 * run(LAYOUTS[name], RIGL)[0]["optimizer"][1]  # three states for two


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_fraction_zero_is_static_to_the_last_digit(run, name):
    """Although RigL collects its gradients."""
    still = RIGL | {"algorithm": name, "update": {"every": EVERY, "fraction": 0.0}}
    collected, static = (run(LAYOUTS["zero 1"], sparsity)[0] for sparsity in (still, 0.75))
    assert collected["losses"] == static["losses"] and collected["masks"] == static["masks"]


def test_every_move_is_in_the_log_and_in_the_checkpoint(one):
    assert [(r["step"], r["update"]) for r in one["moves"]] == [(3, 1), (6, 2), (9, 3)]
    assert all(r["share"] == pytest.approx(0.1, abs=1e-3) for r in one["moves"])
    overlaps = [r["overlap"] for r in one["moves"]]
    assert overlaps[0] == pytest.approx(1.0 - one["moves"][0]["share"], abs=1e-12)
    assert overlaps[0] > overlaps[1] > overlaps[2] > 0.9**3 - 0.01
    for record in one["moves"]:
        assert list(record["layers"]) == ["0", "1", "2", "3"]
        layers = record["layers"].values()  # which have as many active entries
        for key in ("share", "overlap"):
            assert np.mean([layer[key] for layer in layers]) == pytest.approx(record[key])
    assert one["run"]["masks"] == {"kind": "moved", "how": "random, seed 0",
                                   "algorithm": "wander", "updates": 3}
    assert one["run"]["state"]["mask_updates"] == 3
    for found in one["run"]["sparsity"].values():
        assert found["measured"] == pytest.approx(found["target"], abs=1e-9)


@pytest.mark.parametrize("name", SAME)
def test_nothing_moves_with_fraction_zero(run, name):
    still, static, moved = (run(LAYOUTS[name], sparsity)[0] for sparsity in (
        WANDER | {"update": {"every": EVERY, "fraction": 0.0}}, 0.75, WANDER))
    assert (still["losses"], still["masks"]) == (static["losses"], static["masks"])
    assert still["losses"] != moved["losses"]


@pytest.mark.parametrize("name", SAME)
def test_a_run_stopped_at_a_move_and_after_it_goes_on_bit_for_bit(ranks, recipe, run, tmp_path,
                                                                  name):
    cut, straight = recipe(LAYOUTS[name], str(tmp_path / "run")), run(LAYOUTS[name])[0]
    parts = [ranks(2).run(trained, cut, stop) for stop in (6, 7, None)]
    assert sum((part["losses"] for part in parts), []) == straight["losses"]
    assert parts[-1]["masks"] == straight["masks"]


@pytest.mark.parametrize(("stop", "before", "after"), [
    (5, "zero 1", "tp2"), (6, "tp2", "pp2"), (7, "pp2", "zero 0"),
    (5, "deepspeed zero 3", "deepspeed zero 1"), (6, "zero 1", "deepspeed zero 3"),
    (7, "deepspeed zero 2", "tp2")])
def test_a_run_stopped_around_a_move_goes_on_at_another_layout(ranks, recipe, one, tmp_path, stop,
                                                               before, after):
    """One step before a move, at it, and one step after it."""
    recipes = [recipe(LAYOUTS[layout], str(tmp_path / "run")) for layout in (before, after)]
    first = ranks(2).run(trained, recipes[0], stop)
    second = ranks(2).run_all(trained, recipes[1])
    assert len(first["losses"]) == stop
    close(first["losses"] + second[0]["losses"], one["losses"])
    assert together(second) == one["masks"]
    assert seen(second[0]) == seen(one)  # the log of both


def test_rigl_stopped_before_at_and_after_a_move_goes_on_at_another_layout_each_time(
        ranks, recipe, run, tmp_path):
    layouts = ["zero 1", "tp2 sp", "deepspeed zero 2", "pp2"]
    recipes = [recipe(LAYOUTS[name], str(tmp_path / "run"), RIGL) for name in layouts]
    parts = [ranks(2).run_all(trained, made, stop)
             for made, stop in zip(recipes, (5, 6, 7, None), strict=True)]
    reference = run({}, RIGL)[0]
    close(sum((part[0]["losses"] for part in parts), []), reference["losses"])
    moved = sum(move["moved"] for move in reference["moves"])
    assert differing(parts[-1], reference) <= 1e-3 * moved


def test_a_skipped_step_moves_nothing(ranks, recipe):
    found = ranks(2).run(trained, recipe(LAYOUTS["zero 1"]), skip=6)
    # One of the steps is not counted: later moves come a step later.
    assert [r["step"] for r in found["moves"]] == [3, 7, 10]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "zero" in name])
def test_the_planner_knows_what_a_move_sends(run, name):
    found = run(LAYOUTS[name])[0]
    assert len(found["sent"]) == found["predicted"].count == 3
    exact = 0.1 if name == "deepspeed zero 3" else 1e-9  # which keeps some weights whole
    assert found["sent"] == [pytest.approx(found["predicted"].carried, rel=exact)] * 3
    found = run(LAYOUTS[name], RIGL)[0]
    predicted = found["predicted"].carried + found["predicted"].reduced
    assert found["sent"] == [pytest.approx(predicted, rel=exact)] * 3


def test_the_state_of_another_optimizer_moves_too(run, one):
    by_default = WANDER | {"update": {"every": EVERY, "stop": 1.0}}  # it has no averages
    there = run(LAYOUTS["zero 1"] | SGD, by_default)[0]
    close(there["losses"], run(SGD, by_default)[0]["losses"])
    assert there["masks"] == one["masks"]


command = partial(run_with, plugins="wander")


def test_it_is_planned_trained_and_inspected_from_the_command_line(make_recipe, tmp_path):
    values = make_recipe(str(tmp_path / "run"), sparsity=WANDER)
    values["train"] |= {"tokens": 8 * 32 * 5}
    values["optimizer"]["warmup_tokens"] = 256
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = command(tmp_path, "pretrain.py", "recipe.yaml", plugins="")
    assert refused.returncode == 2
    assert "there is no mask algorithm 'wander'; known: " in refused.stderr
    assert not (tmp_path / "run").exists()
    says = ("mask algorithm wander: at random, 0.1 of the active entries of each slice every 3 "
            "steps, from 0% to 100% of the steps; 1 move in 5 steps")
    planned = command(tmp_path, "tools/plan.py", "recipe.yaml", "--gpu", "h100", "--gpus", "1")
    assert says in planned.stdout, planned.stderr
    done = command(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and "step 3: wander moved" in done.stdout
    looked = command(tmp_path, "tools/inspect_checkpoint.py", "run", "--verify")
    assert looked.returncode == 0, looked.stderr
    assert "masks random, seed 0, moved 1 time by wander" in looked.stdout
    assert ("wander, 1 of 1 moves; sparsity 75.00% now, 75.00% at the end; 90.0" in looked.stdout
            and "% of the active entries are as at first, by layer 90.0" in looked.stdout)
    other = command(tmp_path, "tools/convert_checkpoint.py", "reshard", "run", "two",
                "parallel.tensor=2")
    assert other.returncode == 0, other.stderr
    facts = [json.loads(command(tmp_path, "tools/inspect_checkpoint.py", where, "--verify",
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
        done = command(tmp_path, *words)
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
    values["stages"] = [{"share": 0.5, "sparsity": WANDER}, {"share": 0.25, "sparsity": 0},
                        {"share": 0.25, "sparsity": WANDER}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = command(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "2 moves in 8 steps" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    moves = [r for r in records if r["kind"] == "mask"]
    assert [r["step"] for r in moves] == [3, 6, 15]
    assert {r["sparsity"] for r in records if r["kind"] == "train"
            and 8 < r["step"] <= 12} == {0.0}
    # the mask that its own stage began with
    assert moves[1]["overlap"] < 0.83 and moves[2]["overlap"] == 1.0 - moves[2]["share"]
    looked = command(tmp_path, "tools/inspect_checkpoint.py", "run", "--verify", "--json")
    progress = json.loads(looked.stdout)["algorithm"]
    assert (progress["moves"], progress["planned"]) == (3, 3)
    assert progress["overlap"] == pytest.approx(moves[2]["overlap"])
    assert progress["layers"] == {n: layer["overlap"] for n, layer in moves[2]["layers"].items()}
