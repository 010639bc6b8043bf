"""The engine against an independent reference, and the guards that keep a bad step out of the
weights."""

import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

POISON = {2: "loss", 4: "gradient"}
WORLDS = {1: {}, 2: {"data": 2}}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    short = {"tokens": 8 * 32 * 12}
    guard = {"train": short | {"global_batch": 8, "micro_batch": 8, "precision": "fp32"},
             "optimizer": {"warmup_tokens": 256}, "checkpoint": {"every": 2, "keep": 9},
             "fault_tolerance": {"max_skipped": 3}}
    one = {
        "sparse": ("against_plain", {"recipe": make_recipe(), "steps": 20}),
        "dense": ("against_plain", {"recipe": make_recipe(sparsity=0.0), "steps": 20}),
        "poisoned": ("poisoned", {"recipe": make_recipe(), "poison": POISON}),
        "guarded": ("guarded", {"recipe": make_recipe(**guard), "bad_from": 6}),
        "drifting": ("drifting", {"recipe": make_recipe(**guard)}),
    }
    two = {
        "poisoned": ("poisoned", {"recipe": make_recipe(parallel={"data": 2}), "poison": POISON}),
        "poisoned zero 0": ("poisoned",
                            {"recipe": make_recipe(parallel={"data": 2, "zero_stage": 0}),
                                         "poison": POISON}),
        "poisoned pp2": ("poisoned",
                         {"recipe": make_recipe(parallel={"pipeline": 2}), "poison": POISON}),
    }
    directory = tmp_path_factory.mktemp("training")
    return {world: run_cases(world, cases, directory / str(world)) for world,
            cases in ((1, one), (2, two))}


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_equals_plain_pytorch_on_transformers_gpt2(results, name):
    there = outcome(results[1], name)
    for (loss, norm), (loss_plain, norm_plain) in zip(there["engine"], there["plain"], strict=True):
        assert loss == pytest.approx(loss_plain, rel=1e-5)
        assert norm == pytest.approx(norm_plain, rel=1e-4)
    # Adam divides by the root of a tiny second moment: rounding of a gradient near zero moves a
    # weight by up to about the learning rate, 1e-3, in one step.
    assert there["weights apart"] < 1e-3


@pytest.mark.parametrize(("world", "name"),
                         [(1, "poisoned"), (2, "poisoned"), (2, "poisoned zero 0"),
                                             (2, "poisoned pp2")])
def test_a_non_finite_step_changes_nothing_on_any_rank(results, world, name):
    for rank in range(world):
        there = outcome(results[world], name, rank)
        assert [s["skipped"] for s in there["steps"]] == [False, True, False, True, False]
        assert [s["changed"] for s in there["steps"]] == [True, False, True, False, True]
        assert there["optimizer_steps"] == 3


def test_too_many_bad_steps_in_a_row_stop_the_run_before_anything_is_saved(results):
    there = outcome(results[1], "guarded")
    assert there["end"].startswith("NotFinite: 4 steps in a row up to step 9")
    assert "fault_tolerance.max_skipped=3" in there["end"] and "optimizer.lr" in there["end"]
    # Steps 6 and 8 were skipped, so what they saved is the good state of step 5.
    assert there["saved"] == ["step_00000002", "step_00000004", "step_00000006", "step_00000008"]


def test_drifting_sparsity_stops_the_run_before_it_is_saved(results):
    there = outcome(results[1], "drifting")
    assert (
        there["end"].startswith("SparsityDrift")
        and "planned 0.750000, measured 0.000000" in there["end"]
    )
    assert there["saved"] == []
