"""Invariant 2: an interrupted run equals a straight one, bit for bit at the same layout, within
rounding at another."""

import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

STEPS = 6
LAYOUTS = {
    "fp32 zero 1": ({}, {"data": 2}),
    "fp32 zero 0": ({}, {"data": 2, "zero_stage": 0}),
    "bf16 zero 1": ({"train": {"precision": "bf16"}}, {"tensor": 2}),
    "pp2 interleaved": ({}, {"pipeline": 2, "interleave": 2}),
    "dense": ({"sparsity": 0.0}, {"data": 2}),
    "dropout": ({"model": {"dropout": 0.1}}, {"tensor": 2}),
}
# Layouts of a chain of three, resumed from one another.
CHAINS = {
    "tp2 -> pp2 -> dp2": [{"tensor": 2}, {"pipeline": 2}, {"data": 2}],
    "zero 0 -> zero 1 -> interleaved": [{"data": 2, "zero_stage": 0}, {"data": 2},
                                        {"pipeline": 2, "interleave": 2}],
}


@pytest.fixture(scope="module")
def results(make_deep_recipe, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    cases = {}
    for name, (sections, parallel) in LAYOUTS.items():
        straight = make_deep_recipe(str(runs / f"{name} straight"), parallel=parallel, **sections)
        pieces = make_deep_recipe(str(runs / f"{name} cut"), parallel=parallel, **sections)
        cases[f"{name} straight"] = ("cut", {"recipes": [straight], "stops": [STEPS]})
        cases[f"{name} cut"] = ("cut", {"recipes": [pieces] * 3, "stops": [2, 3, STEPS]})
    for name, layouts in CHAINS.items():
        recipes = [make_deep_recipe(str(runs / name), parallel=layout) for layout in layouts]
        cases[name] = ("cut", {"recipes": recipes, "stops": [2, 4, STEPS]})
    recipe = make_deep_recipe(str(runs / "overlap"), parallel={"data": 2})
    cases["overlap cut"] = ("overlapped_cut", {"recipes": [recipe] * 2, "stops": [3, STEPS]})
    return run_cases(2, cases, tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_twice_equals_straight_bit_for_bit(results, name):
    assert outcome(results, f"{name} cut") == outcome(results, f"{name} straight")


def test_a_checkpoint_holds_what_an_overlapped_gather_has_still_to_bring(results):
    assert outcome(results, "overlap cut") == outcome(results, "fp32 zero 1 straight")


@pytest.mark.parametrize("name", CHAINS)
def test_resumed_at_other_layouts_equals_straight(results, name):
    losses = [loss for loss, _ in outcome(results, name)]
    straight = [loss for loss, _ in outcome(results, "fp32 zero 1 straight")]
    assert losses == pytest.approx(straight, rel=1e-5)
