"""ERK gives matrices the densities of its papers, by another computation, to the exact budget."""

from __future__ import annotations

import pytest

from megatron_spdf.architecture.base import Weight
from megatron_spdf.sparsity.distribution import erk_densities, whole_entries
from megatron_spdf.sparsity.plan import Plan, make_plan
from megatron_spdf.sparsity.settings import Sparsity


def densities(plan: Plan) -> dict[str, float]:
    return {name.split("layers.0.")[1]: w.active / w.numel for name, w in plan.weights.items()
            if "layers.0." in name}


@pytest.mark.parametrize(("level", "attention", "feed_forward"), [
    (0.75, 0.3333, 0.2083), (0.9, 0.1333, 0.0833)])
def test_attention_is_four_thirds_as_dense_and_the_feed_forward_five_sixths(recipe, level,
                                                                            attention,
                                                                            feed_forward):
    """Of a GPT block of width h with Q, K and V as matrices of their own."""
    model = recipe(model={"hidden": 256, "heads": 4}).model
    plan = make_plan(Sparsity(level=level, distribution="erk"), model.weights(), model.slices)
    found = densities(plan)
    for name, density in found.items():
        wanted = attention if "attention" in name else feed_forward
        assert density == pytest.approx(wanted, abs=2e-4), name
    uniform = make_plan(Sparsity(level=level), model.weights(), model.slices)
    assert plan.active == uniform.active and plan.numel == uniform.numel


@pytest.mark.parametrize("sections", [
    {"hidden": 64, "heads": 4}, {"hidden": 72, "heads": 6, "query_groups": 3},
    {"hidden": 96, "heads": 3, "ffn_hidden": 33}, {"hidden": 64, "heads": 4, "ffn_hidden": 4096}])
@pytest.mark.parametrize("level", [0.3, 0.75, 0.987])
def test_as_many_are_active_as_with_one_level(recipe, sections, level):
    model = recipe(model=sections).model
    plans = [make_plan(Sparsity(level=level, distribution=how), model.weights(), model.slices)
             for how in ("uniform", "erk")]
    linear = sum(w.numel for w in model.weights() if w.linear)
    uniform, erk = (plan.active + linear - plan.numel for plan in plans)  # the dense count too
    assert abs(uniform - erk) < model.slices  # slices of a weight have as many active entries


def test_weights_that_the_slices_do_not_divide_have_as_many_active_entries_as_uniform_ones():
    """Each of them is one slice, so that no remainder is left."""
    weights = [Weight(str(rows), (rows, 33), 0, 0, linear=True) for rows in (9, 15, 27, 63)]
    uniform, erk = (make_plan(Sparsity(level=0.75, distribution=how), weights, 4)
                    for how in ("uniform", "erk"))
    assert {w.slices for w in erk.weights.values()} == {1}
    assert erk.active == uniform.active == sum(round(0.25 * w.numel) for w in weights)


def test_what_would_be_over_dense_is_dense_and_others_share_the_rest():
    """Solved by hand: 4 x 4, 4 x 100 and 100 x 100 at density 0.2 of 10,416 entries. The small
    ones have raw scores 0.5 and 0.26, the large one 0.02."""
    weights = [Weight(str(n), shape, 0, 0, linear=True)
               for n, shape in enumerate([(4, 4), (4, 100), (100, 100)])]
    small, flat, large = erk_densities(weights, 0.2)
    assert (small, flat) == (1.0, 1.0)
    assert large == pytest.approx((0.2 * 10_416 - 416) / 10_000)


def test_matrices_that_are_one_weight_count_alone():
    fused = erk_densities([Weight("qkv", (96, 32), 0, 0, linear=True, matrices=(32, 32, 32)),
                           Weight("proj", (32, 32), 0, 0, linear=True)], 0.25)
    assert fused == pytest.approx([0.25, 0.25])
    whole = erk_densities([Weight("qkv", (96, 32), 0, 0, linear=True),
                           Weight("proj", (32, 32), 0, 0, linear=True)], 0.25)
    assert whole[0] < 0.25 < whole[1]


def test_rules_stand_and_only_the_others_share(recipe):
    model = recipe().model
    rules = [{"weights": "*.linear_fc1.*", "level": 0.5}]
    plan = make_plan(Sparsity(level=0.75, distribution="erk", rules=rules), model.weights(),
                     model.slices)
    assert all(w.level == 0.5 for name, w in plan.weights.items() if "fc1" in name)
    rest = [w for name, w in plan.weights.items() if "fc1" not in name]
    assert sum(w.active for w in rest) / sum(w.numel for w in rest) == pytest.approx(0.25, abs=1e-4)
    assert rest[0].level < 0.75 < rest[2].level


@pytest.mark.parametrize(("slices", "budget", "active"), [
    ((1, 1, 1, 1), 20, [3, 4, 3, 10]),  # 16 + 1 of weights rounded down, three more
    ((1, 1, 1, 1), 18, [2, 4, 2, 10]),  # the largest remainder first
    ((1, 1, 1, 1), 19, [3, 4, 2, 10]),  # of equal ones the first
    ((1, 4, 1, 1), 27, [3, 3, 2, 10]),  # one of four slices costs four
    ((1, 4, 1, 1), 30, [2, 4, 2, 10])])
def test_remainders_decide_who_has_one_more(slices, budget, active):
    """Of ten entries each: 2.5, 3.75, 2.5 and all."""
    assert whole_entries([0.25, 0.375, 0.25, 1.0], [10] * 4, slices, budget) == active


def test_every_slice_has_an_active_entry_and_no_more_than_it_has():
    assert whole_entries([0.001, 1.0], [10, 4], [1, 1], 9) == [2, 4]
    assert whole_entries([0.001, 1.0], [10, 4], [1, 1], 3) == [1, 4]
