"""Fine-tuning: from a sparse start to dense or sparse, the same at every layout and with both
engines."""

import json

import numpy as np
import pytest
from cases import cut
from curves import close
from finetune_cases import (
    against_plain,
    cut_finetuning,
    densified_start,
    finetuned,
    revived,
    stopped_early,
)
from harness import world_of

pytestmark = pytest.mark.slow

# 61 pairs in batches of 8: the last batch of the first epoch is short, and the second epoch begins
STEPS = 10
WORDS = "self return import class not for the if".split()
LAYOUTS = {
    "micro-batch 1": {"train": {"micro_batch": 1}},
    "zero 0": {"engine": "deepspeed", "parallel": {"zero_stage": 0}},
    "dp2 megatron": {"parallel": {"data": 2}, "train": {"micro_batch": 1}},
    "dp2 zero 1": {"engine": "deepspeed", "parallel": {"data": 2}, "train": {"micro_batch": 2}},
    "dp2 zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3},
                   "train": {"micro_batch": 4}},
    "tp2 sp zero 2": {"engine": "deepspeed",
                      "parallel": {"tensor": 2, "sequence": True, "zero_stage": 2},
                      "train": {"micro_batch": 2}},
    "tp2 megatron": {"parallel": {"tensor": 2}, "train": {"micro_batch": 8}},
}
SPARSE = {"mode": "sparse"}
SPARSE_LAYOUTS = {
    "dp2 zero 3": SPARSE | LAYOUTS["dp2 zero 3"],
    "tp2 zero 1": SPARSE | {"engine": "deepspeed", "parallel": {"tensor": 2}},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    place, draw = tmp_path_factory.mktemp("task"), np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(1, most + 1)))

    for split, count in (("train", 61), ("validation", 19)):
        lines = [json.dumps({"context": words(4), "completion": words(6)}) for _ in range(count)]
        (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def start(ranks, make_recipe, tmp_path_factory):
    """Recipe of a sparse run that has been trained, from which all others start."""
    recipe = make_recipe(str(tmp_path_factory.mktemp("start") / "run"), sparsity=0.75)
    ranks(1).run(cut, [recipe], [6])
    return recipe


@pytest.fixture(scope="module")
def recipe(start, task):
    """A fine-tuning recipe as nested values, with sections changed by keyword."""
    def make(**sections) -> dict:
        made = {
            "checkpoint": start["output"], "output": None, "engine": "megatron", "seed": 7,
            "data": {"task": "jsonl", "path": str(task)},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "train": {"epochs": 2, "global_batch": 8, "micro_batch": 8, "precision": "fp32",
                      "label_smoothing": 0.1}}
        for name, change in sections.items():
            made[name] = {**made.get(name, {}), **change} if isinstance(change, dict) else change
        return made
    return make


@pytest.fixture(scope="module")
def tuned(ranks, recipe):
    """What each rank gives of fine-tuning with these sections."""
    def run(**sections) -> list[dict]:
        made = recipe(**sections)
        return ranks(world_of(made)).run_all(finetuned, made, steps=STEPS)
    return run


def close_tuned(there: dict, reference: dict):
    close(there["curve"], reference["curve"])
    for when in ("before", "after"):
        assert there[when] == pytest.approx(reference[when], rel=1e-5)


@pytest.mark.parametrize("sections", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_are_the_same_at_every_layout(tuned, sections):
    close_tuned(tuned(**sections)[0], tuned()[0])


@pytest.mark.parametrize("sections", SPARSE_LAYOUTS.values(), ids=SPARSE_LAYOUTS)
def test_sparse_losses_are_too(tuned, sections):
    close_tuned(tuned(**sections)[0], tuned(**SPARSE)[0])


def test_loss_is_the_mean_over_completion_tokens(ranks, recipe):
    steps = ranks(1).run(against_plain, recipe(train={"micro_batch": 2}), STEPS)
    for loss, plain, norm, plain_norm in steps:
        assert loss == pytest.approx(plain, rel=1e-5)
        assert norm == pytest.approx(plain_norm, rel=1e-4)


@pytest.mark.parametrize("sections", [{}, SPARSE], ids=["dense", "sparse"])
def test_fine_tuning_learns(tuned, sections):
    there = tuned(**sections)[0]
    assert there["after"] < there["before"] - 0.5


@pytest.mark.parametrize(("sections", "parameters"),
                         [({}, 24 * 64 * 64), (SPARSE, 6 * 64 * 64)], ids=["dense", "sparse"])
def test_the_start_changes_no_logit(ranks, start, recipe, sections, parameters):
    there = ranks(1).run(densified_start, start, recipe(**sections))
    assert there["difference"] == 0.0 and there["spread"] > 0.01
    others = there["parameters"] - parameters
    assert others == 384 * 64 + 32 * 64 + 2 * (4 * 64 + 3 * 64 + 64 + 4 * 64 + 64) + 2 * 64


@pytest.mark.parametrize("sections", [SPARSE, *SPARSE_LAYOUTS.values()],
                         ids=["one", *SPARSE_LAYOUTS])
def test_the_sparse_mode_keeps_the_mask(tuned, sections):
    together = {}
    for there in tuned(**sections):
        assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)
        together |= there["masks"]
    assert together == tuned(**SPARSE)[0]["masks"] and len(together) == 2 * 4 * 4


def test_the_dense_mode_has_no_mask(tuned):
    there = tuned()[0]
    assert there["masks"] == {} and there["sparsity"] == {}
    assert set(there["planned"].values()) == {0.75}


def test_revived_weights_are_normal_and_the_same_at_every_layout(ranks, recipe):
    normal = {"revived": "normal", "revived_scale": 0.5}
    one = ranks(1).run(revived, recipe(**normal))
    two = ranks(2).run_all(revived, recipe(**normal, parallel={"tensor": 2}))
    assert len(one) == 8
    for name, there in one.items():
        assert there["kept"] and all(shard[name]["kept"] for shard in two)
        assert there["std"] == pytest.approx(0.5, rel=0.1) and abs(there["mean"]) < 0.1 * 0.5 * 0.02
        assert sum(shard[name]["sum"] for shard in two) == pytest.approx(there["sum"], abs=1e-3)


def test_a_run_ends_when_validation_stops_improving_and_keeps_its_best(ranks, recipe):
    there = ranks(1).run(stopped_early, recipe(evaluate={"every": 2, "patience": 2}),
                         losses=[3.0, 2.0, 2.5, 2.0, 0.0])
    assert there["ends"] == [(0, 8, True), (0, 8, True)]  # the second start finds nothing to do
    assert there["saved"] == ["step_00000004", "step_00000008"]
    assert there["chosen"] == "step_00000004"
    assert there["left"] == [0.0]


def test_a_run_that_goes_to_its_end_keeps_its_best_too(ranks, recipe):
    there = ranks(1).run(stopped_early, recipe(evaluate={"every": 5, "patience": 9}),
                         losses=[3.0, 1.0, 2.0, 1.5, 0.0])
    assert there["ends"] == [(0, 16, True), (0, 16, True)]
    assert (there["saved"], there["chosen"]) == (["step_00000010", "step_00000016"],
                                                 "step_00000010")
    assert there["left"] == [0.0]


@pytest.fixture(scope="module")
def straight(ranks, recipe):
    return ranks(2).run(cut_finetuning, [recipe(**LAYOUTS["dp2 zero 1"])], [STEPS])


def test_resumed_twice_equals_straight_bit_for_bit(ranks, recipe, straight):
    pieces = [recipe(**LAYOUTS["dp2 zero 1"])] * 3
    assert ranks(2).run(cut_finetuning, pieces, [3, 8, STEPS]) == straight


def test_resumed_at_other_stages_layouts_and_engines_equals_straight(ranks, recipe, straight):
    pieces = [recipe(**LAYOUTS[n]) for n in ("dp2 zero 3", "tp2 sp zero 2", "dp2 megatron")]
    losses = [loss for loss, _ in ranks(2).run(cut_finetuning, pieces, [4, 9, STEPS])]
    assert losses == pytest.approx([loss for loss, _ in straight], rel=1e-5)
