"""Progress of a mask algorithm, as tools/inspect_checkpoint.py says it, against masks and schedules
made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_spdf.checkpoint.mask_progress import mask_progress, planned_moves, render_progress
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.algorithms.gmp import Gmp
from megatron_spdf.sparsity.algorithms.set import Set
from megatron_spdf.sparsity.plan import Plan

STEPS = 40
GMP = {"level": 0.75, "algorithm": "gmp",
       "update": {"every": 2, "start": 0.25, "stop": 0.75, "stores": 2}}


def reader(recipe: Recipe, step: int, moves: int, reached: float = 1.0) -> SimpleNamespace:
    recipe = recipe.stored_at(reached)
    return SimpleNamespace(recipe=recipe, plan=Plan.of(recipe),
                           weights={w.name: w for w in recipe.model.weights()},
                           run={"state": {"step": step, "optimizer_steps": step,
                                          "mask_updates": moves}})


@pytest.fixture
def of(recipe):
    def make(sparsity: dict, **sections) -> Recipe:
        made = recipe()
        values = made.model_dump() | {"sparsity": sparsity, **sections}
        values["train"]["tokens"] = STEPS * made.tokens_per_step
        return Recipe.model_validate(values)
    return make


def test_static_masks_have_none(of):
    assert mask_progress(reader(of({"level": 0.75}), 5, 0)) is None


@pytest.mark.parametrize(("step", "moves", "reached", "now"), [
    (8, 0, 0.0, 0.0), (20, 4, 0.2, 0.75 * (1 - 0.5**3)), (30, 9, 1.0, 0.75), (40, 9, 1.0, 0.75)])
def test_gmp_shows_the_level_it_has_come_to(of, step, moves, reached, now):
    """By the cubic, whatever its part of the run stores."""
    found = mask_progress(reader(of(GMP), step, moves, reached))
    assert found["now"] == pytest.approx(now, abs=2e-3)  # whole entries of small slices
    assert found["end"] == pytest.approx(0.75, abs=1e-3)
    assert (found["name"], found["moves"], found["planned"]) == ("gmp", moves, 9)
    assert found["overlap"] is None
    said = render_progress(found)
    part = {8: 1, 20: 2, 30: 2, 40: 3}[step]  # pruned at 12, and to the level at 30
    assert said.startswith(f"gmp, part {part} of 3, {moves} of 9 moves; sparsity "
                           f"{found['now']:.2%} now, 75.0")


def test_the_first_pruning_of_gmp_is_a_border():
    """Due after steps 12, 14, ... 30, and dense weights are pruned at the first of them."""
    gmp = Gmp(**GMP["update"])
    assert sum(gmp.due(step, STEPS) for step in range(1, STEPS + 1)) == 10
    assert planned_moves(gmp, STEPS) == 9
    assert planned_moves(Set(every=10), STEPS) == 2  # before step 30


@pytest.mark.parametrize(("reached", "now"), [(0.0, 0.0), (1.0, 0.75)])
def test_acdc_shows_whether_it_is_dense(of, reached, now):
    sparsity = {"level": 0.75, "algorithm": "acdc"}
    found = mask_progress(reader(of(sparsity), 20, 0, reached))
    assert found["now"] == pytest.approx(now) and found["end"] == pytest.approx(0.75)
    assert "acdc, part 9 of 16, moves at borders of its parts only" in render_progress(found)


def test_overlap_is_that_of_the_bits_by_layer(of):
    """Of the last layer's weights each slice lost its first active entry."""
    recipe = of({"level": 0.75, "algorithm": "set", "update": {"every": 4}})
    there = reader(recipe, 20, 5)
    last = max(w.layer for w in there.weights.values() if w.name in there.plan.weights)

    def first(name: str) -> np.ndarray:
        w = there.plan.weights[name]
        return np.packbits([w.draw(0, c) for c in range(w.slices)], axis=1)

    def bits(name: str) -> np.ndarray:
        w = there.plan.weights[name]
        masks = np.unpackbits(first(name), axis=1)
        if there.weights[name].layer == last:
            masks[np.arange(w.slices), masks.argmax(1)] = 0
        return np.packbits(masks, axis=1)

    there.first_bits, there.mask_bits = first, bits
    found = mask_progress(there)
    weights = [w for n, w in there.plan.weights.items() if there.weights[n].layer == last]
    lost, active = sum(w.slices for w in weights), sum(w.active for w in weights)
    assert found["layers"][str(last)] == pytest.approx(1 - lost / active)
    assert {share for layer, share in found["layers"].items() if layer != str(last)} == {1.0}
    assert found["overlap"] == pytest.approx(1 - lost / there.plan.active)
    assert (found["moves"], found["planned"]) == (5, 7)
    assert f"{found['overlap']:.2%} of the active entries are as at first" in render_progress(found)


def test_moves_of_all_stages_are_planned(of):
    moving = {"level": 0.75, "algorithm": "set", "update": {"every": 4, "stop": 1.0}}
    stages = [{"share": 0.5, "sparsity": moving}, {"share": 0.5, "sparsity": 0}]
    recipe = of({"level": 0.0}, stages=stages).in_stage(0)
    there = reader(recipe, 12, 3)
    there.first_bits = there.mask_bits = lambda name: np.full((1, 1), 255, np.uint8)
    assert mask_progress(there)["planned"] == 4  # after steps 4, 8, 12 and 16 of 20
