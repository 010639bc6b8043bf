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
    # one micro-batch, since two send twice as often
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}, "train": {"micro_batch": 8}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2 interleaved": {"parallel": {"pipeline": 2, "interleave": 2}},
    "dp2 zero 1": {"parallel": {"data": 2}},
    "deepspeed zero 2": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 2}},
    "deepspeed zero 3": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 3}},
}
STRAIGHT = [name for name in LAYOUTS if name != "pp2"]  # of runs that do not stop


def recipes_of(make_recipe: Callable[..., dict], sparsity: dict[str, dict]) -> Callable:
    """Makes recipes by rule and layout, of runs that keep their last checkpoint."""
    def make(rule: str, layout: dict | None = None) -> dict:
        layout = layout or {}
        train = {"tokens": 8 * 32 * STEPS} | layout.get("train", {})
        return make_recipe(sparsity=sparsity[rule], log={"every": 1},
                           checkpoint={"every": 0, "asynchronous": False},
                           **layout | {"train": train})
    return make


def depth_of(*names: str) -> dict:
    """Section of the model where one of the layouts is of interleaved stages, which take four
    layers."""
    return {"model": {"layers": 4}} if "pp2 interleaved" in names else {}


@pytest.fixture(scope="module")
def recipe(make_recipe):
    """A recipe that prunes by a rule, at a layout."""
    return recipes_of(make_recipe, SPARSITY)


def kept(make: Callable[..., dict]) -> Callable[..., dict]:
    """References that are made once for all tests that want them."""
    known: dict[tuple[str, str], dict] = {}

    def reference(rule: str, depth: dict | None = None) -> dict:
        key = rule, repr(depth or {})
        if key not in known:
            known[key] = make(rule, depth)
        return known[key]
    return reference


@pytest.fixture(scope="module")
def reference(ranks, recipe):
    """A run by a rule under plain PyTorch, of a depth, whose masks others follow."""
    return kept(lambda rule, depth: ranks(1).run(plain, recipe(rule, depth), rule))


@pytest.mark.parametrize("rule", SPARSITY)
def test_a_run_equals_the_rule_on_dense_weights(ranks, recipe, reference, rule):
    expected = reference(rule)
    found = ranks(1).run_all(following, [recipe(rule)], [None], expected["masks"])
    close_but_for_ties(found, expected)
    for name, weight in found[0]["weights"].items():
        assert np.count_nonzero(weight) == pytest.approx(0.25 * weight.size, abs=2), name


# AC/DC builds sixteen engines, and the test of stops has its other layouts
@pytest.mark.parametrize(("name", "rule"), [
    *((name, "gmp") for name in STRAIGHT), ("tp2 sp", "acdc")])
def test_every_layout_prunes_alike(ranks, recipe, reference, name, rule):
    expected = reference(rule, depth_of(name))
    recipes = [recipe(rule, LAYOUTS[name] | depth_of(name))]
    close_but_for_ties(ranks(2).run_all(following, recipes, [None], expected["masks"]), expected)


@pytest.mark.parametrize(("rule", "names", "stops"), [
    ("gmp", ["dp2 zero 1", "tp2 sp", "deepspeed zero 3"], [28, 17]),
    # one step before a pruning, at it, and one after it
    ("gmp", ["tp2 sp", "deepspeed zero 2", "pp2 interleaved", "dp2 zero 1"], [24, 1, 1]),
    # ZeRO 3 goes from sparse to dense and back
    ("acdc", ["deepspeed zero 2", "deepspeed zero 3", "pp2", "dp2 zero 1"], [7, 6, 5]),
])
def test_a_run_stopped_in_a_part_and_at_a_border_goes_on_at_another_layout(
        ranks, recipe, reference, rule, names, stops):
    expected = reference(rule, depth_of(*names))
    recipes = [recipe(rule, LAYOUTS[name] | depth_of(*names)) for name in names]
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
    entries = 2 * 12 * 64**2
    records = ranks(1).run(pruned, [recipe("acdc")], [None])["moves"]
    borders = [*range(6, 48, 3), 51]  # of 60 steps: after 10%, 15%, ... 75% and 85%
    assert [r["step"] for r in records] == [border + 1 for border in borders]
    for record in records:
        assert record["moved"] == pytest.approx(0.75 * entries, rel=1e-3)
        assert [*record["layers"]] == ["0", "1"] and "overlap" not in record
        for seen in (record, *record["layers"].values()):
            assert seen["share"] == pytest.approx(0.75, abs=1e-3)
    run = ranks(1).run(pruned, [recipe("gmp")], [None])
    assert [(r["step"], r["update"]) for r in run["moves"]] == [
        (21, 0), (25, 1), (30, 2), (35, 3), (40, 4), (45, 5)]
    zeros = sum(int((w == 0).sum()) for w in run["weights"].values())
    assert sum(r["moved"] for r in run["moves"]) == zeros == pytest.approx(0.75 * entries, rel=1e-3)
