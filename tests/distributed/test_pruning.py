"""GMP and AC/DC follow their papers' rules on dense weights, step by step, at every layout and
across every stop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from curves import close_but_for_ties
from pruning_cases import following, plain, pruned

pytestmark = pytest.mark.slow

STEPS = 60
GMP = {"level": 0.75, "algorithm": "gmp", "update": {"every": 5, "stores": 3}}
ACDC = {"level": 0.75, "algorithm": "acdc"}
SPARSITY = {"gmp": GMP, "acdc": ACDC}
DEEPSPEED = {"engine": "deepspeed"}
LAYOUTS = {
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "pp2 interleaved": {"parallel": {"pipeline": 2, "interleave": 2}},
    "dp2 zero 1": {"parallel": {"data": 2}},
    "deepspeed zero 2": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 2}},
    "deepspeed zero 3": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 3}},
}


def recipes_of(make_deep_recipe: Callable[..., dict], sparsity: dict[str, dict]) -> Callable:
    """Makes recipes by rule and layout, of runs that keep their last checkpoint."""
    def make(rule: str, layout: dict | None = None) -> dict:
        return make_deep_recipe(sparsity=sparsity[rule], train={"tokens": 8 * 32 * STEPS},
                                log={"every": 1}, checkpoint={"every": 0, "asynchronous": False},
                                **(layout or {}))
    return make


@pytest.fixture
def recipe(make_deep_recipe):
    """A recipe that prunes by a rule, at a layout."""
    return recipes_of(make_deep_recipe, SPARSITY)


@pytest.fixture
def reference(ranks, recipe):
    """A run by a rule under plain PyTorch, whose masks others follow."""
    return lambda rule: ranks(1).run(plain, recipe(rule), rule)


@pytest.mark.parametrize("rule", SPARSITY)
def test_a_run_equals_the_rule_on_dense_weights(ranks, recipe, reference, rule):
    expected = reference(rule)
    found = ranks(1).run_all(following, [recipe(rule)], [None], expected["masks"])
    close_but_for_ties(found, expected)
    for name, weight in found[0]["weights"].items():
        assert np.count_nonzero(weight) == pytest.approx(0.25 * weight.size, abs=2), name


# AC/DC builds sixteen engines, and the test of stops has its other layouts
@pytest.mark.parametrize(("name", "rule"), [
    *((name, "gmp") for name in LAYOUTS), ("tp2 sp", "acdc"), ("deepspeed zero 3", "acdc")])
def test_every_layout_prunes_alike(ranks, recipe, reference, name, rule):
    expected = reference(rule)
    close_but_for_ties(ranks(2).run_all(following, [recipe(rule, LAYOUTS[name])], [None],
                                        expected["masks"]), expected)


@pytest.mark.parametrize(("rule", "names", "stops"), [
    ("gmp", ["dp2 zero 1", "tp2 sp", "deepspeed zero 3"], [28, 17]),
    # one step before a pruning, at it, and one after it
    ("gmp", ["tp2 sp", "deepspeed zero 2", "pp2 interleaved", "dp2 zero 1"], [24, 1, 1]),
    ("acdc", ["deepspeed zero 2", "pp2 interleaved", "dp2 zero 1"], [7, 5]),
])
def test_a_run_stopped_in_a_part_and_at_a_border_goes_on_at_another_layout(
        ranks, recipe, reference, rule, names, stops):
    expected = reference(rule)
    recipes = [recipe(rule, LAYOUTS[name]) for name in names]
    close_but_for_ties(ranks(2).run_all(following, recipes, [*stops, None], expected["masks"]),
                       expected)


def test_zeros_and_memory_follow_the_parts(ranks, recipe):
    records = ranks(1).run(pruned, [recipe("gmp")], [None])["records"]
    sparsities = [r["sparsity"] for r in records if r["kind"] == "train"]
    assert sparsities[:15] == [0.0] * 15 and sparsities[-1] == pytest.approx(0.75, abs=1e-3)
    assert all(b >= a - 1e-9 for a, b in zip(sparsities, sparsities[1:], strict=False))


def test_the_log_says_what_dies_and_what_is_born(ranks, recipe):
    """In all and by layer; where weights change from dense to sparse or back, the first step of the
    new part has the record."""
    entries = 4 * 12 * 64**2
    records = ranks(1).run(pruned, [recipe("acdc")], [None])["moves"]
    borders = [*range(6, 48, 3), 51]  # of 60 steps: after 10%, 15%, ... 75% and 85%
    assert [r["step"] for r in records] == [border + 1 for border in borders]
    for record in records:
        assert record["moved"] == pytest.approx(0.75 * entries, rel=1e-3)
        assert [*record["layers"]] == ["0", "1", "2", "3"] and "overlap" not in record
        for seen in (record, *record["layers"].values()):
            assert seen["share"] == pytest.approx(0.75, abs=1e-3)
    run = ranks(1).run(pruned, [recipe("gmp")], [None])
    assert [(r["step"], r["update"]) for r in run["moves"]] == [
        (21, 0), (25, 1), (30, 2), (35, 3), (40, 4), (45, 5)]
    zeros = sum(int((w == 0).sum()) for w in run["weights"].values())
    assert sum(r["moved"] for r in run["moves"]) == zeros == pytest.approx(0.75 * entries, rel=1e-3)
