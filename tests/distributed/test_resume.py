"""Invariant 2: an interrupted run equals a straight one, bit for bit at the same layout, within
rounding at another."""

import pytest
from cases import cut, overlapped

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
CHAINS = {
    "tp2 -> pp2 -> dp2": [{"tensor": 2}, {"pipeline": 2}, {"data": 2}],
    "zero 0 -> zero 1 -> interleaved": [{"data": 2, "zero_stage": 0}, {"data": 2},
                                        {"pipeline": 2, "interleave": 2}],
}


@pytest.fixture(scope="module")
def straight(ranks, make_deep_recipe):
    return ranks(2).run(cut, [make_deep_recipe(parallel={"data": 2})], [STEPS])


@pytest.mark.parametrize(("sections", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_resumed_twice_equals_straight_bit_for_bit(ranks, make_deep_recipe, sections, layout):
    recipe = make_deep_recipe(parallel=layout, **sections)
    straight = ranks(2).run(cut, [recipe], [STEPS])
    assert ranks(2).run(cut, [recipe] * 3, [2, 3, STEPS]) == straight


def test_a_checkpoint_holds_what_an_overlapped_gather_has_still_to_bring(
    ranks, make_deep_recipe, straight
):
    recipe = make_deep_recipe(parallel={"data": 2})
    assert ranks(2).run(overlapped, cut, [recipe] * 2, [3, STEPS]) == straight


@pytest.mark.parametrize("layouts", CHAINS.values(), ids=CHAINS)
def test_resumed_at_other_layouts_equals_straight(ranks, make_deep_recipe, straight, layouts):
    chain = [make_deep_recipe(parallel=layout) for layout in layouts]
    losses = [loss for loss, _ in ranks(2).run(cut, chain, [2, 4, STEPS])]
    assert losses == pytest.approx([loss for loss, _ in straight], rel=1e-5)
