"""GMP and AC/DC follow their papers' rules on dense weights, step by step, at every layout and
across every stop."""

from __future__ import annotations

import numpy as np
import pytest
from harness import outcome, run_cases

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


@pytest.fixture(scope="module")
def results(make_deep_recipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("pruning")

    def recipe(name: str, rule: str, layout: dict) -> dict:
        return make_deep_recipe(str(place / rule / name), sparsity=SPARSITY[rule],
                                train={"tokens": 8 * 32 * STEPS}, log={"every": 1},
                                checkpoint={"every": 0, "asynchronous": False}, **layout)

    def pruned(name: str, rule: str, layouts: list[dict], stops=()) -> tuple[str, dict]:
        recipes = [recipe(name, rule, layout) for layout in layouts]
        return "pruning_cases.pruned", {"recipes": recipes, "stops": [*stops, None]}

    one, two = {}, {}
    for rule in SPARSITY:
        one[f"plain {rule}"] = ("pruning_cases.plain", {"recipe": recipe("plain", rule, {}),
                                                        "rule": rule})
        one[f"one {rule}"] = pruned("one", rule, [{}])
        for name, layout in LAYOUTS.items():
            two[f"{name} {rule}"] = pruned(name, rule, [layout])
    # stopped between two prunings of a part, then at a border
    two["cut gmp"] = pruned("cut", "gmp", [LAYOUTS["dp2 zero 1"], LAYOUTS["tp2 sp"],
                                           LAYOUTS["deepspeed zero 3"]], [28, 17])
    two["cut acdc"] = pruned("cut", "acdc", [LAYOUTS["deepspeed zero 2"], LAYOUTS["pp2 interleaved"],
                                             LAYOUTS["dp2 zero 1"]], [7, 5])
    return {1: run_cases(1, one, place / "1"), 2: run_cases(2, two, place / "2")}


def agree(found: dict, expected: dict) -> None:
    """Losses to rounding; the same entries are zero, but for a near tie or two."""
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert len(found["losses"]) == STEPS
    apart = sum(int(((w != 0) != (expected["weights"][name] != 0)).sum())
                for name, w in found["weights"].items())
    assert apart <= 4


@pytest.mark.parametrize("rule", SPARSITY)
def test_a_run_equals_the_rule_on_dense_weights(results, rule):
    found, plain = (outcome(results[1], f"{which} {rule}") for which in ("one", "plain"))
    agree(found, plain)
    for name, weight in found["weights"].items():
        assert np.count_nonzero(weight) == pytest.approx(0.25 * weight.size, abs=2), name


@pytest.mark.parametrize("rule", SPARSITY)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_prunes_alike(results, name, rule):
    agree(outcome(results[2], f"{name} {rule}"), outcome(results[1], f"one {rule}"))


@pytest.mark.parametrize("rule", SPARSITY)
def test_a_run_stopped_in_a_part_and_at_a_border_goes_on_at_another_layout(results, rule):
    agree(outcome(results[2], f"cut {rule}"), outcome(results[1], f"one {rule}"))


def test_memory_falls_with_the_parts(results):
    """The bytes of gradients and optimizer state that the log counts in the buffers."""
    records = outcome(results[1], "one gmp")["records"]
    sparsities = [r["sparsity"] for r in records if r["kind"] == "train"]
    assert sparsities[:15] == [0.0] * 15 and sparsities[-1] == pytest.approx(0.75, abs=1e-3)
    assert all(b >= a - 1e-9 for a, b in zip(sparsities, sparsities[1:], strict=False))
