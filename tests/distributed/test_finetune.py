"""Fine-tuning: from a sparse start to dense or sparse, the same at every layout and with both
engines."""

import json

import numpy as np
import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

# 61 pairs in batches of 8: the last batch of the first epoch is short, and the second epoch begins
STEPS = 10
WORDS = "self return import class not for the if".split()
LAYOUTS = {
    1: {
        "micro-batch 1": {"train": {"micro_batch": 1}},
        "zero 0": {"engine": "deepspeed", "parallel": {"zero_stage": 0}},
    },
    2: {
        "dp2 megatron": {"parallel": {"data": 2}, "train": {"micro_batch": 1}},
        "dp2 zero 1": {"engine": "deepspeed", "parallel": {"data": 2}, "train": {"micro_batch": 2}},
        "dp2 zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3},
                       "train": {"micro_batch": 4}},
        "tp2 sp zero 2": {"engine": "deepspeed",
                          "parallel": {"tensor": 2, "sequence": True, "zero_stage": 2},
                          "train": {"micro_batch": 2}},
        "tp2 megatron": {"parallel": {"tensor": 2}, "train": {"micro_batch": 8}},
    },
}
NAMES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]
SPARSE = {"mode": "sparse"}
SPARSE_LAYOUTS = {
    "sparse dp2 zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3},
                          "train": {"micro_batch": 4}},
    "sparse tp2 zero 1": {"engine": "deepspeed", "parallel": {"tensor": 2}},
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
def results(make_recipe, task, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    start = make_recipe(str(runs / "start"), sparsity=0.75)

    def recipe(output: str = "none", **sections) -> dict:
        made = {
            "checkpoint": str(runs / "start"), "output": str(runs / output), "engine": "megatron",
            "seed": 7,
            "data": {"task": "jsonl", "path": str(task)},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "train": {"epochs": 2, "global_batch": 8, "micro_batch": 8, "precision": "fp32",
                      "label_smoothing": 0.1}}
        for name, change in sections.items():
            made[name] = {**made.get(name, {}), **change} if isinstance(change, dict) else change
        return made

    def finetuned(**sections) -> tuple[str, dict]:
        return "finetune_cases.finetuned", {"recipe": recipe(**sections), "steps": STEPS}

    def cut(output: str, changes: list[dict], stops: list[int]) -> tuple[str, dict]:
        return "finetune_cases.cut_finetuning", {"recipes": [recipe(output, **c) for c in changes],
                                                 "stops": stops}

    normal = {"revived": "normal", "revived_scale": 0.5}
    one = {
        "start": ("cut", {"recipes": [start], "stops": [6]}),
        "reference": finetuned(),
        "sparse": finetuned(**SPARSE),
        "densified": ("finetune_cases.densified_start", {"start": start, "recipe": recipe()}),
        "kept sparse": ("finetune_cases.densified_start",
                        {"start": start, "recipe": recipe(**SPARSE)}),
        "plain": ("finetune_cases.against_plain",
                  {"recipe": recipe(train={"micro_batch": 2}), "steps": STEPS}),
        "revived": ("finetune_cases.revived", {"recipe": recipe(**normal)}),
        "early": ("finetune_cases.stopped_early", {
            "recipe": recipe("early", evaluate={"every": 2, "patience": 2}),
            "losses": [3.0, 2.0, 2.5, 2.0, 0.0]}),
        "to the end": ("finetune_cases.stopped_early", {
            "recipe": recipe("to the end", evaluate={"every": 5, "patience": 9}),
            "losses": [3.0, 1.0, 2.0, 1.5, 0.0]}),
    } | {name: finetuned(**sections) for name, sections in LAYOUTS[1].items()}
    two = {name: finetuned(**sections) for name, sections in LAYOUTS[2].items()}
    two |= {name: finetuned(**SPARSE, **sections) for name, sections in SPARSE_LAYOUTS.items()}
    two |= {
        "revived": ("finetune_cases.revived", {"recipe": recipe(**normal, parallel={"tensor": 2})}),
        "straight": cut("straight", [LAYOUTS[2]["dp2 zero 1"]], [STEPS]),
        "cut": cut("cut", [LAYOUTS[2]["dp2 zero 1"]] * 3, [3, 8, STEPS]),
        "chain": cut("chain",
                     [LAYOUTS[2][n] for n in ("dp2 zero 3", "tp2 sp zero 2", "dp2 megatron")],
                     [4, 9, STEPS]),
    }
    directory = tmp_path_factory.mktemp("finetune")
    found = {1: run_cases(1, one, directory / "1"),
             2: run_cases(2, two, directory / "2", timeout=1200)}
    outcome(found[1], "start")  # from which all others start
    return found


def close(there: dict, reference: dict):
    for (loss, norm), (loss_there, norm_there) in zip(there["curve"], reference["curve"],
                                                      strict=True):
        assert loss == pytest.approx(loss_there, rel=1e-5)
        assert norm == pytest.approx(norm_there, rel=1e-4)  # a root of a sum over all weights
    for when in ("before", "after"):
        assert there[when] == pytest.approx(reference[when], rel=1e-5)


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_losses_are_the_same_at_every_layout(results, world, name):
    close(outcome(results[world], name), outcome(results[1], "reference"))


@pytest.mark.parametrize("name", SPARSE_LAYOUTS)
def test_sparse_losses_are_too(results, name):
    close(outcome(results[2], name), outcome(results[1], "sparse"))


def test_loss_is_the_mean_over_completion_tokens(results):
    for loss, plain, norm, plain_norm in outcome(results[1], "plain"):
        assert loss == pytest.approx(plain, rel=1e-5)
        assert norm == pytest.approx(plain_norm, rel=1e-4)


@pytest.mark.parametrize("name", ["reference", "sparse"])
def test_fine_tuning_learns(results, name):
    there = outcome(results[1], name)
    assert there["after"] < there["before"] - 0.5


@pytest.mark.parametrize(("name", "parameters"),
                         [("densified", 24 * 64 * 64), ("kept sparse", 6 * 64 * 64)])
def test_the_start_changes_no_logit(results, name, parameters):
    there = outcome(results[1], name)
    assert there["difference"] == 0.0 and there["spread"] > 0.01
    others = there["parameters"] - parameters
    assert others == 384 * 64 + 32 * 64 + 2 * (4 * 64 + 3 * 64 + 64 + 4 * 64 + 64) + 2 * 64


@pytest.mark.parametrize(("world", "name"),
                         [(1, "sparse"), *((2, name) for name in SPARSE_LAYOUTS)])
def test_the_sparse_mode_keeps_the_mask(results, world, name):
    there = outcome(results[world], name)
    assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)
    together = {}
    for rank in range(world):
        together |= outcome(results[world], name, rank)["masks"]
    assert together == outcome(results[1], "sparse")["masks"] and len(together) == 2 * 4 * 4


def test_the_dense_mode_has_no_mask(results):
    there = outcome(results[1], "reference")
    assert (
        there["masks"] == {}
        and there["sparsity"] == {}
        and set(there["planned"].values()) == {0.75}
    )


def test_revived_weights_are_normal_and_the_same_at_every_layout(results):
    one, two = outcome(results[1],
                       "revived"), [outcome(results[2], "revived", rank) for rank in range(2)]
    assert len(one) == 8
    for name, there in one.items():
        assert there["kept"] and all(shard[name]["kept"] for shard in two)
        assert there["std"] == pytest.approx(0.5, rel=0.1) and abs(there["mean"]) < 0.1 * 0.5 * 0.02
        assert sum(shard[name]["sum"] for shard in two) == pytest.approx(there["sum"], abs=1e-3)


def test_a_run_ends_when_validation_stops_improving_and_keeps_its_best(results):
    there = outcome(results[1], "early")
    assert there["ends"] == [(0, 8, True), (0, 8, True)]  # the second start finds nothing to do
    assert there["saved"] == ["step_00000004", "step_00000008"]
    assert there["chosen"] == "step_00000004"
    assert there["left"] == [0.0]


def test_a_run_that_goes_to_its_end_keeps_its_best_too(results):
    there = outcome(results[1], "to the end")
    assert there["ends"] == [(0, 16, True), (0, 16, True)]
    assert (there["saved"], there["chosen"]) == (["step_00000010", "step_00000016"],
                                                 "step_00000010")
    assert there["left"] == [0.0]


def test_resumed_twice_equals_straight_bit_for_bit(results):
    assert outcome(results[2], "cut") == outcome(results[2], "straight")


def test_resumed_at_other_stages_layouts_and_engines_equals_straight(results):
    losses = [loss for loss, _ in outcome(results[2], "chain")]
    assert losses == pytest.approx([loss for loss, _ in outcome(results[2], "straight")], rel=1e-5)
