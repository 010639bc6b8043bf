"""Stages of a run: nothing changes at the border but what may be learnt, and it is one run however
it is cut."""

import pytest
import torch
from harness import world_of
from mup import MUP
from stage_cases import across, samples_of_stages, staged

pytestmark = pytest.mark.slow

STEPS, BORDER = 9, 6
STAGES = [{"share": 2 / 3, "sparsity": 0.75, "lr": 3e-3, "warmup_tokens": 512},
          {"share": 1 / 3, "sparsity": 0.0, "lr": 1e-3, "warmup_tokens": 300}]
DATA_2, DEEPSPEED = {"data": 2}, {"engine": "deepspeed"}
ACROSS = {
    "one rank": {},
    "bf16": {"train": {"precision": "bf16"}},
    "mup": MUP,
    "tp2": {"parallel": {"tensor": 2}},
    "pp2": {"parallel": {"pipeline": 2}},
    "dp2 zero 1": {"parallel": DATA_2},
    "deepspeed zero 1": {**DEEPSPEED, "parallel": {**DATA_2, "zero_stage": 1},
                         "train": {"precision": "bf16"}},
    "deepspeed zero 3": {**DEEPSPEED, "parallel": {**DATA_2, "zero_stage": 3},
                         "train": {"precision": "bf16"}},
}


@pytest.fixture(scope="module")
def recipe(make_recipe):
    """A run of two stages, with sections changed by keyword."""
    def make(**sections) -> dict:
        train = {"tokens": 8 * 32 * STEPS, "micro_batch": 4, **sections.pop("train", {})}
        return make_recipe(sparsity=0.0, stages=STAGES, train=train, log={"every": 1},
                           evaluate={"every": 2, "batches": 1}, **sections)
    return make


@pytest.fixture(scope="module")
def border(ranks, recipe):
    """What each rank sees at the border of a run."""
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))

    def seen(name: str) -> list[dict]:
        made = recipe(**ACROSS[name])
        return ranks(world_of(made)).run_all(across, made, ids)
    return seen


@pytest.mark.parametrize("name", ACROSS)
def test_the_border_changes_no_output_and_revives_at_zero(border, name):
    ranks = border(name)
    seen = [r for r in ranks if r["before"] is not None]
    assert seen or "deepspeed" in name
    for rank in seen:
        # Densified, the same products are summed in the same order.
        assert torch.equal(rank["before"], rank["after"])
    for rank in ranks:
        assert rank["moments"] == 0.0
        assert (rank["state"].step, rank["state"].optimizer_steps) == (BORDER, 0)
        assert rank["said"] == [f"densified step_{BORDER:08}"]
        assert rank["origin"] == "given weights"  # of the run, whatever began it
        if "zero 3" not in name:
            assert rank["zeros"] == pytest.approx([0.75] * len(rank["zeros"]),
                                                  abs=2e-3) and rank["zeros"]


@pytest.mark.parametrize("name", ACROSS)
def test_after_the_border_it_is_a_plain_dense_run(border, name):
    there = border(name)[0]
    curve, plain = ([figure for step in there[which] for figure in step]
                    for which in ("stage", "plain"))
    assert len(curve) == 2 * (STEPS - BORDER)
    # Under `mup` the conversion on disk goes through a standard GPT and back, with a rounding each
    # way.
    assert curve == (pytest.approx(plain, rel=1e-6) if name == "mup" else plain)


# DeepSpeed's ZeRO-3 leaves small parameters behind.
@pytest.mark.parametrize("name", [name for name in ACROSS if "zero 3" not in name])
def test_two_engines_are_never_in_memory_together(border, name):
    assert {there["alive"] for there in border(name)} == {0}


@pytest.fixture(scope="module")
def straight(ranks, recipe):
    return ranks(2).run(staged, [recipe(parallel=DATA_2)], [None])


def test_a_run_is_one_log_with_the_schedules_of_its_stages(straight):
    train = [r for r in straight["records"] if r["kind"] == "train"]
    assert straight["codes"] == [0]
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    assert [r["sparsity"] for r in train] == [0.75] * BORDER + [0.0] * (STEPS - BORDER)
    assert train[1]["lr"] == pytest.approx(3e-3) and train[BORDER - 1]["lr"] == pytest.approx(3e-4)
    # 256 tokens into a warm-up of 300
    assert train[BORDER]["lr"] == pytest.approx(1e-3 * 256
                                                / 300) and train[-1]["lr"] == pytest.approx(1e-4)
    assert [r["step"] for r in straight["records"] if r["kind"] == "valid"] == [2, 4, 6, 8, 9]
    steps = [after["flops"] - before["flops"] for before,
             after in zip(train, train[1:], strict=False)]
    assert steps[: BORDER - 1] == pytest.approx([train[0]["flops"]] * (BORDER - 1))
    dense = train[0]["flops"] + 0.75 * 6 * 2 * 12 * 64 * 64 * 256  # 6 FLOPs a weight and token
    assert steps[BORDER - 1 :] == pytest.approx([dense] * (STEPS - BORDER))


def test_no_sample_is_read_twice(ranks, recipe):
    numbers = ranks(2).run_all(samples_of_stages, recipe(parallel=DATA_2, data={"valid": []}))
    assert sorted(sum(numbers, [])) == list(range(8 * STEPS))


def test_stopped_before_at_and_after_the_border_equals_straight(ranks, recipe, straight):
    stops = [2, BORDER, BORDER + 1, None]
    there = ranks(2).run(staged, [recipe(parallel=DATA_2)] * 4, stops)
    assert there["codes"] == [75, 75, 75, 0]
    assert there["engines"] == [1, 1, 1, 1]  # none of a stage that is over
    assert there["records"] == straight["records"]


@pytest.mark.parametrize(("layouts", "stop"), [
    ([DATA_2, {"tensor": 2}], BORDER),
    ([{"pipeline": 2}, {**DATA_2, "zero_stage": 0}], BORDER + 1),
], ids=["dp2 -> tp2 at the border", "pp2 -> dp2 zero 0 after it"])
def test_the_layout_may_change_across_the_border(ranks, recipe, straight, layouts, stop):
    recipes = [recipe(parallel=layout) for layout in layouts]
    there = ranks(2).run(staged, recipes, [stop, None])["records"]
    for key in ("step", "sparsity", "lr", "tokens", "flops"):
        assert [r.get(key) for r in there] == [r.get(key) for r in straight["records"]]
    assert [r["loss"] for r in there] == pytest.approx([r["loss"] for r in straight["records"]],
                                                       rel=1e-5)
