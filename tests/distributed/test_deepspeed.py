"""Invariant 1 on DeepSpeed: losses, gradient norms, masks and checkpoints equal those of the
Megatron-Core engine."""

import os
import shutil

import pytest
import torch
from harness import outcome, run_cases
from mup import MUP

from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.convert.deepspeed_import import DeepSpeedReader

pytestmark = pytest.mark.slow

STEPS = 4
STAGES = range(4)
# Cases with their sections; each runs with both engines.
RUNS = {
    "dp2": {"parallel": {"data": 2}, "train": {"micro_batch": 2}},
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "dense": {"parallel": {"data": 2}, "sparsity": 0.0},
    "bf16": {"parallel": {"data": 2}, "train": {"precision": "bf16"}},
    "dropout": {"parallel": {"tensor": 2}, "model": {"dropout": 0.1}},
    "smoothing": {"parallel": {"tensor": 2}, "train": {"label_smoothing": 0.1}},
    "recompute": {"parallel": {"data": 2}, "train": {"recompute": "full"}},
    "mup": {"parallel": {"tensor": 2}, **MUP},
    "no clipping": {"parallel": {"data": 2}, "optimizer": {"clip_grad": 0.0}},
}
ALL_STAGES = ["dp2", "tp2"]
PAIRS = [(name, zero) for name in ALL_STAGES for zero in STAGES] + [
    ("tp2 sp", 2), ("dense", 1), ("dense", 3), ("dropout", 1), ("smoothing", 2), ("mup", 0),
    ("mup", 3), ("recompute", 2), ("no clipping", 2)]
OFFLOADED = [2, 3]
# A chain of starts: engine and layout of each.
CHAIN = [
    {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}},
    {"engine": "deepspeed", "parallel": {"tensor": 2, "zero_stage": 2}},
    {"engine": "megatron", "parallel": {"data": 2}},
    {"engine": "deepspeed", "parallel": {"tensor": 2, "zero_stage": 3}},
]

# Checkpoints that DeepSpeed writes itself: sections and ZeRO stage.
WRITTEN = {
    "tp2 zero 0": (RUNS["tp2"], 0), "dp2 zero 1": (RUNS["dp2"], 1),
    "bf16 zero 2": (RUNS["bf16"], 2),
    "bf16 zero 3": (RUNS["bf16"], 3), "tp2 zero 3": (RUNS["tp2"], 3),
}


def with_stage(sections: dict, zero: int, **parallel) -> dict:
    return {**sections, "engine": "deepspeed",
            "parallel": {**sections["parallel"], "zero_stage": zero, **parallel}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory of the runs; `own` holds what DeepSpeed writes itself."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(make_recipe, runs, tmp_path_factory):

    def train(sections: dict) -> tuple[str, dict]:
        return "train", {"recipe": make_recipe(**sections), "steps": STEPS}

    def cut(name: str, recipes: list[dict], stops: list[int]) -> tuple[str, dict]:
        return "cut", {"recipes": [make_recipe(str(runs / name), **r) for r in recipes],
                       "stops": stops}

    cases = {f"{name} megatron": train(sections) for name, sections in RUNS.items()}
    cases |= {f"{name} {zero}": train(with_stage(RUNS[name], zero)) for name, zero in PAIRS}
    cases |= {f"bf16 {zero}": train(with_stage(RUNS["bf16"], zero)) for zero in STAGES}
    cases |= {f"offloaded {zero}": train(with_stage(RUNS["dp2"], zero, offload=True))
              for zero in OFFLOADED}
    for zero in STAGES:
        recipe = with_stage(RUNS["bf16"] if zero % 2 else RUNS["dp2"], zero)
        cases[f"straight {zero}"] = cut(f"straight {zero}", [recipe], [4])
        cases[f"cut {zero}"] = cut(f"cut {zero}", [recipe] * 3, [1, 2, 4])
        cases[f"poisoned {zero}"] = ("poisoned", {
            "recipe": make_recipe(**recipe), "poison": {2: "loss", 4: "gradient"}})
    for name, (sections, zero) in WRITTEN.items():
        cases[f"written {name}"] = ("saved_by_deepspeed", {
            "recipe": make_recipe(**with_stage(sections, zero)), "steps": 2,
            "directory": str(runs / "own" / name)})
    cases["chain"] = cut("chain", CHAIN, [1, 2, 3, 4])
    return run_cases(2, cases, tmp_path_factory.mktemp("deepspeed"))


def close(there: dict, reference: dict, tolerance: float):
    for (loss, norm), (loss_there, norm_there) in zip(there["curve"], reference["curve"],
                                                      strict=True):
        assert loss == pytest.approx(loss_there, rel=tolerance)
        # a root of a sum over all weights
        assert norm == pytest.approx(norm_there, rel=10 * tolerance)
    assert there["valid"] == pytest.approx(reference["valid"], rel=tolerance)


@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_losses_and_gradient_norms_are_the_megatron_engines(results, name, zero):
    close(outcome(results, f"{name} {zero}"), outcome(results, f"{name} megatron"), 1e-5)


@pytest.mark.parametrize("zero", OFFLOADED)
def test_offloading_changes_no_loss(results, zero):
    close(outcome(results, f"offloaded {zero}"), outcome(results, "dp2 megatron"), 1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_bf16_agrees_to_its_precision(results, zero):
    # 8 bits of mantissa. Master weights, gradients and their sums are fp32 with both engines but at
    # stage 0, which adds gradients up in bf16.
    close(outcome(results, f"bf16 {zero}"), outcome(results, "bf16 megatron"),
          1e-3 if zero == 0 else 1e-4)


@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_masks_and_measured_sparsity_are_the_same(results, name, zero):
    for rank in range(2):
        there, reference = outcome(results, f"{name} {zero}",
                                   rank), outcome(results, f"{name} megatron", rank)
        assert there["masks"] == reference["masks"]
        assert there["sparsity"] == reference["sparsity"]
    assert bool(there["masks"]) == (name != "dense")


@pytest.mark.parametrize(("name", "zero"), [*PAIRS, *(("bf16", zero) for zero in STAGES)])
def test_predicted_bytes_are_those_held(results, name, zero):
    there = outcome(results, f"{name} {zero}")
    for what in ("parameters", "optimizer"):
        # DeepSpeed pads
        assert there["held"][what] == pytest.approx(there["predicted"][what], rel=0.03), what


@pytest.mark.parametrize("zero", STAGES)
def test_resumed_twice_equals_straight_bit_for_bit(results, zero):
    assert outcome(results, f"cut {zero}") == outcome(results, f"straight {zero}")


def test_a_run_goes_on_at_any_stage_layout_and_engine(results):
    losses = [loss for loss, _ in outcome(results, "chain")]
    assert losses == pytest.approx([loss for loss, _ in outcome(results, "dp2 megatron")["curve"]],
                                   rel=1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_a_non_finite_step_changes_nothing_on_any_rank(results, zero):
    for rank in range(2):
        there = outcome(results, f"poisoned {zero}", rank)
        assert [s["skipped"] for s in there["steps"]] == [False, True, False, True, False]
        assert [s["changed"] for s in there["steps"]] == [True, False, True, False, True]
        assert there["optimizer_steps"] == 3


@pytest.mark.parametrize("name", WRITTEN)
def test_deepspeeds_own_checkpoint_holds_the_same_weights(results, name):
    for rank in range(2):
        assert outcome(results, f"written {name}", rank) == 0.0


@pytest.fixture
def written(results, runs, make_recipe, tmp_path):
    """A copy of DeepSpeed's own checkpoint of two data-parallel ranks, and what reads it."""
    outcome(results, "written bf16 zero 2")
    (place,) = shutil.copytree(runs / "own" / "bf16 zero 2",
                               tmp_path / "own").glob("global_step*")
    model = make_recipe()["model"]
    return place, lambda **shape: DeepSpeedReader(tmp_path / "own",
                                                  Gpt.model_validate(model | shape))


def test_files_of_a_missing_rank_are_named(written):
    place, read = written
    next(place.glob("*zero_pp_rank_1_*")).unlink()
    with pytest.raises(ValueError,
                       match="optimizer states of 1 of 2 data-parallel ranks; copy all of them"):
        read()


def test_another_model_is_named(written):
    _, read = written
    with pytest.raises(ValueError,
                       match=r"embedding.word_embeddings.weight is \(384, 64\) there and \(512, "
                             r"64\) in"):
        read(vocab_size=500)
    with pytest.raises(ValueError,
                       match=r"it has no decoder\.layers\.2\..*Set the recipe's model section"):
        read(layers=3)


def test_what_could_be_code_is_refused(written, tmp_path):
    place, read = written
    file = next(place.glob("mp_rank_00*"))
    state = torch.load(file, weights_only=False)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({**state, "client": Evil()}, file)
    with pytest.raises(ValueError,
                       match=r"mp_rank_00_model_states\.pt cannot be read without running code"):
        read()
    assert not (tmp_path / "ran").exists()


def test_a_directory_of_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of DeepSpeed: it has neither"):
        DeepSpeedReader(tmp_path, Gpt(preset="gpt2_small"))
