"""Invariant 1 on DeepSpeed: losses, gradient norms, masks and checkpoints equal those of the
Megatron-Core engine."""

import os
import shutil

import pytest
import torch
from cases import cut, poisoned, saved_by_deepspeed, train
from curves import close_runs
from mup import MUP

from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.convert.deepspeed_import import DeepSpeedReader

pytestmark = pytest.mark.slow

STEPS = 4
STAGES = range(4)
RUNS = {  # names -> sections; each runs with both engines
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
PAIRS = [(name, zero) for name in ("dp2", "tp2") for zero in STAGES] + [
    ("tp2 sp", 2), ("dense", 1), ("dense", 3), ("dropout", 1), ("smoothing", 2), ("mup", 0),
    ("mup", 3), ("recompute", 2), ("no clipping", 2)]


def at_stage(name: str, zero: int, **parallel) -> dict:
    return {**RUNS[name], "engine": "deepspeed",
            "parallel": {**RUNS[name]["parallel"], "zero_stage": zero, **parallel}}


@pytest.fixture(scope="module")
def run(ranks, make_recipe):
    """What each rank gives of a run with these sections."""
    return lambda sections: ranks(2).run_all(train, make_recipe(**sections), steps=STEPS)


@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_losses_and_gradient_norms_are_the_megatron_engines(run, name, zero):
    close_runs(run(at_stage(name, zero))[0], run(RUNS[name])[0])


@pytest.mark.parametrize("zero", [2, 3])
def test_offloading_changes_no_loss(run, zero):
    close_runs(run(at_stage("dp2", zero, offload=True))[0], run(RUNS["dp2"])[0])


@pytest.mark.parametrize("zero", STAGES)
def test_bf16_agrees_to_its_precision(run, zero):
    # 8 bits of mantissa. Master weights, gradients and their sums are fp32 with both engines but at
    # stage 0, which adds gradients up in bf16.
    close_runs(run(at_stage("bf16", zero))[0], run(RUNS["bf16"])[0], 1e-3 if zero == 0 else 1e-4)


@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_masks_and_measured_sparsity_are_the_same(run, name, zero):
    for there, reference in zip(run(at_stage(name, zero)), run(RUNS[name]), strict=True):
        assert there["masks"] == reference["masks"]
        assert there["sparsity"] == reference["sparsity"]
        assert bool(there["masks"]) == (name != "dense")


@pytest.mark.parametrize(("name", "zero"), [*PAIRS, *(("bf16", zero) for zero in STAGES)])
def test_predicted_bytes_are_those_held(run, name, zero):
    there = run(at_stage(name, zero))[0]
    for what in ("parameters", "optimizer"):
        # DeepSpeed pads
        assert there["held"][what] == pytest.approx(there["predicted"][what], rel=0.03), what


@pytest.mark.parametrize("zero", STAGES)
def test_resumed_twice_equals_straight_bit_for_bit(ranks, make_recipe, zero):
    recipe = make_recipe(**at_stage("bf16" if zero % 2 else "dp2", zero))
    straight = ranks(2).run(cut, [recipe], [4])
    assert ranks(2).run(cut, [recipe] * 3, [1, 2, 4]) == straight


def test_a_run_goes_on_at_any_stage_layout_and_engine(ranks, run, make_recipe):
    chain = [make_recipe(**sections) for sections in (
        {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}},
        {"engine": "deepspeed", "parallel": {"tensor": 2, "zero_stage": 2}},
        {"engine": "megatron", "parallel": {"data": 2}},
        {"engine": "deepspeed", "parallel": {"tensor": 2, "zero_stage": 3}})]
    losses = [loss for loss, _ in ranks(2).run(cut, chain, [1, 2, 3, 4])]
    straight = [loss for loss, _ in run(RUNS["dp2"])[0]["curve"]]
    assert losses == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_a_non_finite_step_changes_nothing_on_any_rank(ranks, make_recipe, zero):
    recipe = make_recipe(**at_stage("bf16" if zero % 2 else "dp2", zero))
    for there in ranks(2).run_all(poisoned, recipe, {2: "loss", 4: "gradient"}):
        assert [s["skipped"] for s in there["steps"]] == [False, True, False, True, False]
        assert [s["changed"] for s in there["steps"]] == [True, False, True, False, True]
        assert there["optimizer_steps"] == 3


@pytest.mark.parametrize(("name", "zero"), [("tp2", 0), ("dp2", 1), ("bf16", 2), ("bf16", 3),
                                            ("tp2", 3)])
def test_deepspeeds_own_checkpoint_holds_the_same_weights(ranks, make_recipe, tmp_path, name,
                                                          zero):
    recipe = make_recipe(**at_stage(name, zero))
    assert ranks(2).run_all(saved_by_deepspeed, recipe, 2, str(tmp_path)) == [0.0, 0.0]


@pytest.fixture(scope="module")
def own(ranks, make_recipe, tmp_path_factory):
    """DeepSpeed's own checkpoint of two data-parallel ranks."""
    place = tmp_path_factory.mktemp("own")
    ranks(2).run(saved_by_deepspeed, make_recipe(**at_stage("bf16", 2)), 2, str(place))
    return place


@pytest.fixture
def written(own, make_recipe, tmp_path):
    """A copy of that checkpoint, and what reads it."""
    (place,) = shutil.copytree(own, tmp_path / "own").glob("global_step*")
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
