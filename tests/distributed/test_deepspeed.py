"""The DeepSpeed engine against the Megatron-Core engine: the same losses, gradient norms, masks and checkpoints."""

import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

STEPS = 8
STAGES = range(4)
# Cases with their sections; each runs with both engines.
RUNS = {
    "dp2": {"parallel": {"data": 2}},
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "dense": {"parallel": {"data": 2}, "sparsity": 0.0},
    "bf16": {"parallel": {"data": 2}, "train": {"precision": "bf16"}},
    "dropout": {"parallel": {"tensor": 2}, "model": {"dropout": 0.1}},
    "smoothing": {"parallel": {"tensor": 2}, "train": {"label_smoothing": 0.1}},
    "recompute": {"parallel": {"data": 2}, "train": {"recompute": "full"}},
    "no clipping": {"parallel": {"data": 2}, "optimizer": {"clip_grad": 0.0}},
}
ALL_STAGES = ["dp2", "tp2"]
PAIRS = [(name, zero) for name in ALL_STAGES for zero in STAGES] + [
    ("tp2 sp", 2), ("dense", 0), ("dense", 1), ("dense", 3), ("dropout", 1), ("dropout", 3), ("smoothing", 2),
    ("recompute", 1), ("recompute", 3), ("no clipping", 0), ("no clipping", 2)]
OFFLOADED = [1, 2, 3]
# A chain of starts: engine and layout of each.
CHAIN = [
    {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 0}},
    {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}},
    {"engine": "deepspeed", "parallel": {"tensor": 2, "zero_stage": 2}},
    {"engine": "megatron", "parallel": {"data": 2}},
    {"engine": "deepspeed", "parallel": {"tensor": 2, "zero_stage": 3}},
    {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 1}},
]


def with_stage(sections: dict, zero: int, **parallel) -> dict:
    return {**sections, "engine": "deepspeed", "parallel": {**sections["parallel"], "zero_stage": zero, **parallel}}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")

    def train(sections: dict) -> tuple[str, dict]:
        return "train", {"recipe": make_recipe(**sections), "steps": STEPS}

    def cut(name: str, recipes: list[dict], stops: list[int]) -> tuple[str, dict]:
        return "cut", {"recipes": [make_recipe(str(runs / name), **r) for r in recipes], "stops": stops}

    cases = {f"{name} megatron": train(sections) for name, sections in RUNS.items()}
    cases |= {f"{name} {zero}": train(with_stage(RUNS[name], zero)) for name, zero in PAIRS}
    cases |= {f"bf16 {zero}": train(with_stage(RUNS["bf16"], zero)) for zero in STAGES}
    cases |= {f"offloaded {zero}": train(with_stage(RUNS["dp2"], zero, offload=True)) for zero in OFFLOADED}
    for zero in STAGES:
        recipe = with_stage(RUNS["bf16"] if zero % 2 else RUNS["dp2"], zero)
        cases[f"straight {zero}"] = cut(f"straight {zero}", [recipe], [6])
        cases[f"cut {zero}"] = cut(f"cut {zero}", [recipe] * 3, [2, 3, 6])
        cases[f"poisoned {zero}"] = ("poisoned", {
            "recipe": make_recipe(**recipe), "poison": {2: "loss", 4: "gradient"}})
    cases["chain"] = cut("chain", CHAIN, [1, 2, 3, 4, 5, 6])
    return run_cases(2, cases, tmp_path_factory.mktemp("deepspeed"), timeout=1800)


def close(there: dict, reference: dict, tolerance: float):
    for (loss, norm), (loss_there, norm_there) in zip(there["curve"], reference["curve"], strict=True):
        assert loss == pytest.approx(loss_there, rel=tolerance)
        assert norm == pytest.approx(norm_there, rel=10 * tolerance)  # a root of a sum over all weights
    assert there["valid"] == pytest.approx(reference["valid"], rel=tolerance)


@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_losses_and_gradient_norms_are_the_megatron_engines(results, name, zero):
    close(outcome(results, f"{name} {zero}"), outcome(results, f"{name} megatron"), 1e-5)


@pytest.mark.parametrize("zero", OFFLOADED)
def test_offloading_changes_no_loss(results, zero):
    close(outcome(results, f"offloaded {zero}"), outcome(results, "dp2 megatron"), 1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_bf16_agrees_to_its_precision(results, zero):
    # 8 bits of mantissa. Master weights, gradients and their sums are fp32 with both engines but at stage 0, which
    # adds gradients up in bf16.
    close(outcome(results, f"bf16 {zero}"), outcome(results, "bf16 megatron"), 1e-3 if zero == 0 else 1e-4)


@pytest.mark.parametrize(("name", "zero"), PAIRS)
def test_masks_and_measured_sparsity_are_the_same(results, name, zero):
    for rank in range(2):
        there, reference = outcome(results, f"{name} {zero}", rank), outcome(results, f"{name} megatron", rank)
        assert there["masks"] == reference["masks"]
        assert there["sparsity"] == reference["sparsity"]
    assert bool(there["masks"]) == (name != "dense")


@pytest.mark.parametrize(("name", "zero"), [*PAIRS, *(("bf16", zero) for zero in STAGES)])
def test_predicted_bytes_are_those_held(results, name, zero):
    there = outcome(results, f"{name} {zero}")
    for what in ("parameters", "optimizer"):
        assert there["held"][what] == pytest.approx(there["predicted"][what], rel=0.03), what  # DeepSpeed pads


@pytest.mark.parametrize("zero", STAGES)
def test_resumed_twice_equals_straight_bit_for_bit(results, zero):
    assert outcome(results, f"cut {zero}") == outcome(results, f"straight {zero}")


def test_a_run_goes_on_at_any_stage_layout_and_engine(results):
    losses = [loss for loss, _ in outcome(results, "chain")]
    assert losses == pytest.approx([loss for loss, _ in outcome(results, "dp2 megatron")["curve"][:6]], rel=1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_a_non_finite_step_changes_nothing_on_any_rank(results, zero):
    for rank in range(2):
        there = outcome(results, f"poisoned {zero}", rank)
        assert [s["skipped"] for s in there["steps"]] == [False, True, False, True, False]
        assert [s["changed"] for s in there["steps"]] == [True, False, True, False, True]
        assert there["optimizer_steps"] == 3
