"""GMP and AC/DC follow their papers' rules on dense weights, step by step, at every layout and
across every stop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pruning_cases import plain, pruned

pytestmark = pytest.mark.slow

STEPS = 60
GMP = {"level": 0.75, "algorithm": "gmp", "update": {"every": 5, "stores": 3}}
ACDC = {"level": 0.75, "algorithm": "acdc"}
SPARSITY = {"gmp": GMP, "acdc": ACDC}
DEEPSPEED = {"engine": "deepspeed"}
DEEP = {"model": {"layers": 4}}  # what interleaved stages take
LAYOUTS = {
    # one micro-batch, since two send twice as often
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}, "train": {"micro_batch": 8}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2 interleaved": {"parallel": {"pipeline": 2, "interleave": 2}} | DEEP,
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


def in_one_process(layout: dict) -> dict:
    """What a run at a layout is compared with."""
    return {"model": layout["model"]} if "model" in layout else {}


@pytest.fixture
def recipe(make_recipe):
    """A recipe that prunes by a rule, at a layout."""
    return recipes_of(make_recipe, SPARSITY)


def agree(found: dict, expected: dict) -> None:
    """Losses to rounding, and the same entries are zero.

    An entry within rounding of the last that dies may live instead of that one. Two entries differ
    then, losses by what one small weight of 98,304 is worth, and a few more in later prunings.
    """
    apart = sum(int(((w != 0) != (expected["weights"][name] != 0)).sum())
                for name, w in found["weights"].items())
    assert apart <= 1e-3 * sum(int((w == 0).sum()) for w in expected["weights"].values())
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4 if apart else 1e-5)
    assert len(found["losses"]) == STEPS


@pytest.mark.parametrize("rule", SPARSITY)
def test_a_run_equals_the_rule_on_dense_weights(ranks, recipe, rule):
    found = ranks(1).run(pruned, [recipe(rule)], [None])
    agree(found, ranks(1).run(plain, recipe(rule), rule))
    for name, weight in found["weights"].items():
        assert np.count_nonzero(weight) == pytest.approx(0.25 * weight.size, abs=2), name


# AC/DC builds sixteen engines, and the test of stops has its other layouts
@pytest.mark.parametrize(("name", "rule"), [
    *((name, "gmp") for name in STRAIGHT), ("tp2 sp", "acdc")])
def test_every_layout_prunes_alike(ranks, recipe, name, rule):
    agree(ranks(2).run(pruned, [recipe(rule, LAYOUTS[name])], [None]),
          ranks(1).run(pruned, [recipe(rule, in_one_process(LAYOUTS[name]))], [None]))


@pytest.mark.parametrize(("rule", "names", "stops"), [
    ("gmp", ["dp2 zero 1", "tp2 sp", "deepspeed zero 3"], [28, 17]),
    # one step before a pruning, at it, and one after it
    ("gmp", ["tp2 sp", "deepspeed zero 2", "pp2 interleaved", "dp2 zero 1"], [24, 1, 1]),
    # ZeRO 3 goes from sparse to dense and back
    ("acdc", ["deepspeed zero 2", "deepspeed zero 3", "pp2", "dp2 zero 1"], [7, 6, 5]),
])
def test_a_run_stopped_in_a_part_and_at_a_border_goes_on_at_another_layout(ranks, recipe, rule,
                                                                           names, stops):
    depth = DEEP if "pp2 interleaved" in names else {}
    recipes = [recipe(rule, LAYOUTS[name] | depth) for name in names]
    agree(ranks(2).run(pruned, recipes, [*stops, None]),
          ranks(1).run(pruned, [recipe(rule, depth)], [None]))


def test_zeros_and_memory_follow_the_parts(ranks, recipe):
    records = ranks(1).run(pruned, [recipe("gmp")], [None])["records"]
    sparsities = [r["sparsity"] for r in records if r["kind"] == "train"]
    assert sparsities[:15] == [0.0] * 15 and sparsities[-1] == pytest.approx(0.75, abs=1e-3)
    assert all(b >= a - 1e-9 for a, b in zip(sparsities, sparsities[1:], strict=False))
