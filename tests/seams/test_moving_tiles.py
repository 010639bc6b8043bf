"""Invariants 1, 2 and 4 while tiles move: layouts change neither masks nor losses, runs resume on
either side of a move, and tiles stay balanced. The reference moves the masks of dense weights by a
rule of its own, tile_rule.py."""

from __future__ import annotations

import pytest
from harness import world_of
from mask_cases import plain, trained

pytestmark = pytest.mark.slow

EVERY, STEPS = 2, 8
DEEPSPEED = {"engine": "deepspeed"}
LAYOUTS = {
    "one": {},
    "four micro-batches": {"train": {"micro_batch": 2}},
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "zero 0": {"parallel": {"data": 2, "zero_stage": 0}},
    "zero 1": {"parallel": {"data": 2}},
    "deepspeed zero 0": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 0}},
    "deepspeed zero 1": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 1}},
    "deepspeed zero 2": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 2}},
    "deepspeed zero 3": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 3}},
}


def tiles(name: str, **update) -> dict:
    return {"level": 0.75, "pattern": "tile", "tile": 8, "algorithm": name,
            "update": {"every": EVERY, "stop": 1.0, "anneal": "constant", **update}}


SET, RIGL = tiles("set"), tiles("rigl", fraction=0.4)


@pytest.fixture(scope="module")
def recipe(make_recipe):
    def make(sections: dict, sparsity: dict, output: str | None = None) -> dict:
        sections = {**sections, "train": {"tokens": 8 * 32 * STEPS, **sections.get("train", {})}}
        return make_recipe(output, sparsity=sparsity, checkpoint={"asynchronous": False},
                           optimizer={"lr": 1e-3, "warmup_tokens": 16, "beta2": 0.95},
                           log={"every": 1}, **sections)
    return make


@pytest.fixture(scope="module")
def run(ranks, recipe):
    """What each rank gives of a run."""
    def on_all(sections: dict, sparsity: dict) -> list[dict]:
        made = recipe(sections, sparsity)
        return ranks(world_of(made)).run_all(trained, made)
    return on_all


def same(there: list[dict], losses: list[float], active: dict) -> None:
    assert there[0]["losses"] == pytest.approx(losses, abs=1e-5)
    together = {key: mask for rank in there for key, mask in rank["active"].items()}
    assert together.keys() == active.keys()
    assert all((mask == together[key]).all() for key, mask in active.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rigl_moves_tiles_as_plain_pytorch_does_at_every_layout(ranks, recipe, run, layout):
    reference = ranks(1).run(plain, recipe({}, RIGL))
    there = run(LAYOUTS[layout], RIGL)
    same(there, reference["losses"], reference["active"])
    # of 8, 16 and 24 tiles of a slice 2, 6 and 10 die; of 2 layers' 2, 2, 4 and 4 slices
    moved = 8 * 8 * 2 * (2 * 10 + 2 * 2 + 4 * 6 + 4 * 6)
    assert [move["moved"] for move in there[0]["moves"]] == [moved] * 3


@pytest.mark.parametrize("layout", ["one", "tp2 sp", "pp2", "zero 1", "deepspeed zero 3"])
def test_set_moves_tiles_as_plain_pytorch_does(ranks, recipe, run, layout):
    reference = ranks(1).run(plain, recipe({}, SET))
    same(run(LAYOUTS[layout], SET), reference["losses"], reference["active"])


@pytest.mark.parametrize(("stop", "before", "after"), [
    (3, "zero 1", "tp2 sp"), (4, "tp2 sp", "deepspeed zero 3"), (5, "deepspeed zero 2", "pp2")])
def test_a_run_stopped_around_a_move_goes_on_at_another_layout(ranks, recipe, run, tmp_path, stop,
                                                               before, after):
    """One step before a move, at it, and one step after it."""
    one = run({}, RIGL)[0]
    first, second = (ranks(2).run_all(trained, recipe(LAYOUTS[layout], RIGL, str(tmp_path / "run")),
                                      last) for layout, last in ((before, stop), (after, None)))
    assert len(first[0]["losses"]) == stop
    same([{**second[0], "losses": first[0]["losses"] + second[0]["losses"]}, *second[1:]],
         one["losses"], one["active"])


def test_interleaved_pipeline_stages_move_tiles_as_plain_pytorch_does(ranks, recipe, run):
    deep = {"model": {"layers": 4}}
    reference = ranks(1).run(plain, recipe(deep, RIGL))
    there = run(deep | {"parallel": {"pipeline": 2, "interleave": 2}}, RIGL)
    same(there, reference["losses"], reference["active"])


@pytest.mark.parametrize(("layout", "batch"), [
    ("one", 4), ("tp2 sp", 4), ("zero 1", 2), ("deepspeed zero 3", 2)])
def test_the_last_micro_batch_alone_ranks_the_tiles_that_are_born(ranks, recipe, run, layout,
                                                                  batch):
    """The last of every rank, summed up with its sign: together the second half of the batch."""
    lean = tiles("rigl", fraction=0.4, gradient="micro_batch")
    reference = ranks(1).run(plain, recipe({"train": {"micro_batch": 4}}, lean))
    there = run(LAYOUTS[layout] | {"train": {"micro_batch": batch}}, lean)
    same(there, reference["losses"], reference["active"])
    whole = ranks(1).run(plain, recipe({}, RIGL))["active"]
    assert any((mask != whole[key]).any() for key, mask in reference["active"].items())


def test_fraction_zero_is_training_with_masks_that_stay(run):
    static = {key: RIGL[key] for key in ("level", "pattern", "tile")}
    still, held = (run(LAYOUTS["zero 1"], s)[0] for s in (tiles("rigl", fraction=0.0), static))
    assert (still["losses"], still["masks"]) == (held["losses"], held["masks"])


def test_the_planner_knows_what_a_move_sends(run):
    for name in ("zero 1", "deepspeed zero 2"):
        found = run(LAYOUTS[name], RIGL)[0]
        predicted = found["predicted"].carried + found["predicted"].reduced
        assert found["sent"] == [pytest.approx(predicted, rel=1e-9)] * 3
        assert found["predicted"].count == 3
