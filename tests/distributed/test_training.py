"""The engine against an independent reference, and the guards that keep a bad step out of the
weights."""

import pytest
from cases import against_plain, drifting, guarded, poisoned
from curves import close
from harness import world_of

pytestmark = pytest.mark.slow

# Nothing at its default, and all of it felt within a few steps: decay of a norm too would be.
STRONG = {"optimizer": {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 5.0,
                        "min_lr_ratio": 0.5, "clip_grad": 0.5}}
DEEPSPEED = {"engine": "deepspeed", "parallel": {"zero_stage": 1}}
POISON = {2: "loss", 4: "gradient"}
GUARD = {"train": {"tokens": 8 * 32 * 12, "global_batch": 8, "micro_batch": 8, "precision": "fp32"},
         "optimizer": {"warmup_tokens": 256}, "checkpoint": {"every": 2, "keep": 9},
         "fault_tolerance": {"max_skipped": 3}}


@pytest.mark.parametrize("sections", [{}, {"sparsity": 0.0}, STRONG, STRONG | DEEPSPEED],
                         ids=["sparse", "dense", "strong", "strong on deepspeed"])
def test_equals_plain_pytorch_on_transformers_gpt2(ranks, make_recipe, sections):
    there = ranks(1).run(against_plain, make_recipe(**sections), steps=20)
    close(there["engine"], there["plain"])
    # Adam divides by the root of a tiny second moment: rounding of a gradient near zero moves a
    # weight by up to about the learning rate, 1e-3, in one step.
    assert there["weights apart"] < 1e-3


@pytest.mark.parametrize("layout", [{}, {"data": 2}, {"data": 2, "zero_stage": 0}, {"pipeline": 2}],
                         ids=str)
def test_a_non_finite_step_changes_nothing_on_any_rank(ranks, make_recipe, layout):
    recipe = make_recipe(parallel=layout)
    for there in ranks(world_of(recipe)).run_all(poisoned, recipe, POISON):
        assert [s["skipped"] for s in there["steps"]] == [False, True, False, True, False]
        assert [s["changed"] for s in there["steps"]] == [True, False, True, False, True]
        assert there["optimizer_steps"] == 3


def test_too_many_bad_steps_in_a_row_stop_the_run_before_anything_is_saved(ranks, make_recipe):
    there = ranks(1).run(guarded, make_recipe(**GUARD), bad_from=6)
    assert there["end"].startswith("NotFinite: 4 steps in a row up to step 9")
    assert "fault_tolerance.max_skipped=3" in there["end"] and "optimizer.lr" in there["end"]
    # Steps 6 and 8 were skipped, so what they saved is the good state of step 5.
    assert there["saved"] == ["step_00000002", "step_00000004", "step_00000006", "step_00000008"]


def test_drifting_sparsity_stops_the_run_before_it_is_saved(ranks, make_recipe):
    there = ranks(1).run(drifting, make_recipe(**GUARD))
    assert there["end"].startswith("SparsityDrift")
    assert "planned 0.750000, measured 0.000000" in there["end"]
    assert there["saved"] == []
