"""What each part of a run that prunes holds, and that the fullest has to fit."""

from __future__ import annotations

import pytest

from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.overview import Request, make_overview
from megatron_spdf.planning.parts import bytes_of_stages
from megatron_spdf.planning.render import render_overview
from megatron_spdf.planning.search import fullest, search
from megatron_spdf.sparsity.plan import Plan

GMP = {"level": 0.75, "algorithm": "gmp", "update": {"every": 1}}


def test_bytes_fall_from_part_to_part_after_the_first(recipe):
    steps = {"train": {"tokens": 400 * recipe().tokens_per_step}}
    parts = bytes_of_stages(recipe(sparsity=GMP, **steps))
    assert [part.number for part in parts] == [1, 2, 3, 4, 5]
    assert parts[0].sparsity == 0.0 and parts[-1].sparsity == pytest.approx(0.75, abs=1e-3)
    totals = [part.total for part in parts]
    assert totals[1] > totals[0] and totals[1:] == sorted(totals[1:], reverse=True)
    assert parts[0].held == rank_bytes(recipe(sparsity=0.0), Plan.of(recipe(sparsity=0.0)), 0, True)


def test_what_is_held_has_a_bit_for_each_that_is_stored(recipe):
    (*_, last) = bytes_of_stages(recipe(sparsity=GMP))
    static = recipe(sparsity=0.75)
    plan = Plan.of(static)
    more = sum(w.slices * -(-w.active_per_slice // 8) for w in plan.weights.values())
    assert last.held.masks - rank_bytes(static, plan, 0, True).masks == more > 0


@pytest.mark.parametrize("algorithm", [{"algorithm": "gmp", "update": {"every": 1}},
                                       {"algorithm": "acdc", "update": {"turn": 0.2}}], ids=str)
def test_a_layout_fits_if_the_fullest_part_does(recipe, algorithm):
    """Not if the end of the run would."""
    pruned, static = recipe(sparsity={"level": 0.75, **algorithm}), recipe(sparsity=0.75)
    most, end = (search(r, Plan.of(r), GPUS["h100"], 1)[0][0] for r in (pruned, static))
    assert most.peak > 1.1 * end.peak
    dense = fullest(most.recipe, Plan.of(recipe(sparsity=0.0))).peak
    assert most.peak >= dense


def test_an_overview_has_a_row_for_each_part_and_says_the_rule_once(recipe):
    pruned = recipe(sparsity=GMP)
    text = render_overview(make_overview(Request(pruned, Plan.of(pruned), GPUS["h100"], 1,
                                                 0.5, "given")))
    assert text.count("stage 2 ") == 2 and text.count("mask algorithm gmp") == 1
    assert "a layout fits if the fullest stage does" in text
