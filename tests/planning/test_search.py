"""The search over layouts against brute force, and the sentences for what cannot be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_spdf.planning import overview
from megatron_spdf.planning import search as module
from megatron_spdf.planning.activations import peak_bytes
from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.overview import Request, at_level, make_overview
from megatron_spdf.planning.render import render_overview
from megatron_spdf.planning.search import (
    USABLE,
    fullest,
    holds,
    laid_out,
    search,
    smallest_world,
    usable_worlds,
)
from megatron_spdf.recipe.rules import divisors, rule_violations
from megatron_spdf.sparsity.plan import Plan

GPU = GPUS["h100"]


def gpt(recipe, **sections):
    return recipe(**{"model": {"layers": 6, "hidden": 12288, "heads": 96, "vocab_size": 51200,
                               "max_positions": 2048},
                     "train": {"global_batch": 48, "micro_batch": 1, "sequence_length": 2048,
                               "tokens": 10**9},
                     **sections})  # 11B parameters


def fits(r, plan) -> bool:
    return all(peak_bytes(r, plan, s) <= USABLE * GPU.memory for s in range(r.parallel.pipeline))


def test_every_layout_that_fits_is_found_and_no_other(recipe):
    r = gpt(recipe)
    plan = Plan.of(r)
    found, misfits = search(r, plan, GPU, 16)
    brute = set()
    for tensor, pipeline in itertools.product((1, 2, 4, 8), divisors(6)):
        if 16 % (tensor * pipeline):
            continue
        data = 16 // (tensor * pipeline)
        for interleave, micro, again in itertools.product(range(1, 9), range(1, 33),
                                                          ("none", "selective", "full")):
            if interleave > 1 and pipeline == 1 or 6 % (pipeline * interleave):
                continue
            candidate = laid_out(r, tensor, pipeline, data, interleave, micro, again)
            if not any(rule_violations(candidate)) and fits(candidate, plan):
                brute.add((tensor, pipeline, data, interleave, micro, again))
    layouts = [(c.recipe.parallel, c.recipe.train) for c in found]
    assert brute == {(p.tensor, p.pipeline, p.data, p.interleave, t.micro_batch, t.recompute)
                     for p, t in layouts}
    rates = [c.tokens_per_second for c in found]
    assert rates == sorted(rates, reverse=True) and len(found) > 20
    used = {(c.recipe.parallel.tensor, c.recipe.parallel.pipeline) for c in found}
    assert not used & {(m.recipe.parallel.tensor, m.recipe.parallel.pipeline) for m in misfits}
    assert len(used) + len(misfits) == sum(16 % (t * p) == 0 for t in (1, 2, 4, 8)
                                           for p in divisors(6))


def test_misfits_say_by_how_much(recipe):
    r = gpt(recipe)
    _, misfits = search(r, Plan.of(r), GPU, 16)
    large = [m for m in misfits if m.excess is not None]
    assert large and [m.excess for m in large] == sorted(m.excess for m in large)
    for misfit in large:
        peak = fullest(misfit.recipe, Plan.of(r)).peak
        # the smallest variant, of which less cannot be asked
        train = misfit.recipe.train
        assert (train.micro_batch, train.recompute) == (1, "full")
        assert misfit.excess == pytest.approx(peak - USABLE * GPU.memory, abs=1)
        assert f"{misfit.excess / 2**30:,.1f} GiB too much" in misfit.reason


@pytest.mark.parametrize("level", [0.0, 0.75])
def test_smallest_world_is_the_smallest(recipe, level):
    r = at_level(gpt(recipe), level)
    plan = Plan.of(r)
    least = smallest_world(r, plan, GPU)
    assert fits(least.recipe, plan) and not any(rule_violations(least.recipe))
    assert holds(r, plan, GPU, least.recipe.parallel.world)
    assert not any(holds(r, plan, GPU, world) for world in range(1, least.recipe.parallel.world))


def test_sparse_runs_fit_on_fewer_gpus(recipe):
    worlds = [smallest_world(r, Plan.of(r), GPU).recipe.parallel.world
              for r in (at_level(gpt(recipe), level) for level in (0.0, 0.5, 0.75))]
    assert worlds[0] > worlds[1] >= worlds[2]


def request(r, gpus, gpu=GPU, price=None) -> Request:
    return Request(r, Plan.of(r), gpu, gpus, 0.6, "assumed", price)


def test_numbers_that_cannot_be_laid_out(recipe):
    r = gpt(recipe)
    assert usable_worlds(r, GPU, 17) == [16, 18]
    with pytest.raises(ValueError,
                       match="17 GPUs cannot be laid out: .*global_batch=48.*that can: 16, 18"):
        make_overview(request(r, 17))


def test_a_run_that_fits_nowhere_is_told_what_does(recipe):
    with pytest.raises(ValueError) as refused:
        make_overview(request(gpt(recipe), 1))
    message = str(refused.value)
    assert ("no layout of 1 x H100 holds this run. The nearest, tensor 1 x pipeline 1 x data 1, "
            "needs") in message
    assert "GiB too much" in message and " x H100 (tensor " in message


def test_more_memory_or_sparsity_is_offered(recipe):
    r = gpt(recipe)
    dense = smallest_world(r, Plan.of(r), GPU).recipe.parallel.world
    fewer = next(n for n in range(dense - 1, 0, -1) if not holds(r, Plan.of(r), GPU, n) and holds(
        r, Plan.of(r), GPUS["mi300x"], n))
    with pytest.raises(ValueError, match=f"{fewer} x MI300X"):
        make_overview(request(r, fewer))
    least = at_level(r, 0.75)
    sparse = smallest_world(least, Plan.of(least), GPU).recipe.parallel.world
    with pytest.raises(ValueError, match=f"{sparse} x H100 with sparsity=0"):
        make_overview(request(r, sparse))


def test_overview_adds_up(recipe):
    facts = make_overview(request(gpt(recipe, sparsity=0.75), 16, price=2.5))
    best = facts["layouts"][0]
    assert best["cost"] == pytest.approx(2.5 * best["gpu_hours"])
    assert best["cost"] == pytest.approx(2.5 * 16 * best["hours"])
    assert best["step_seconds"] == pytest.approx(sum(best["time"].values()))
    for row in facts["best"]["memory"]:
        parts = [v for k, v in row.items() if k not in ("stage", "total", "step")]
        assert row["total"] == sum(parts)
    fullest_shown = max(row["total"] for row in facts["best"]["memory"])
    assert fullest_shown <= best["peak_bytes"] <= facts["request"]["usable_bytes"]
    assert [row["sparsity"] for row in facts["sparsity"]] == pytest.approx([0.0, 0.5, 0.75, 0.9],
                                                                           abs=1e-6)
    assert [row["recipe"] for row in facts["sparsity"]] == [False, False, True, False]
    zero = facts["best"]["zero"]
    assert zero == sorted(zero, reverse=True)


def test_a_sparsity_of_rules_is_compared_as_it_is(recipe):
    rules = {"level": 0.5, "rules": [{"weights": "*.mlp.*", "level": 0.8}]}
    facts = make_overview(request(gpt(recipe, sparsity=rules), 16))
    own = [row for row in facts["sparsity"] if row["recipe"]]
    assert len(facts["sparsity"]) == 5 and len(own) == 1
    assert own[0]["sparsity"] == pytest.approx((4 * 0.5 + 8 * 0.8) / 12, abs=1e-6)


def test_overview_as_text(recipe):
    text = render_overview(make_overview(request(gpt(recipe, sparsity=0.75), 16)))
    for words in ("layouts fit", "fullest moment", "on the wire", "What sparsity buys",
                  "the recipe"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 160


def test_the_last_stage_may_be_the_fullest(recipe):
    """With a large vocabulary, a head that is not the embedding, and one micro-batch in flight."""
    r = recipe(model={"layers": 2, "hidden": 1024, "heads": 8, "vocab_size": 400_000,
                      "max_positions": 64},
               train={"global_batch": 1, "micro_batch": 1, "sequence_length": 64},
               parallel={"pipeline": 2})
    plan = Plan.of(r)
    first, last = (peak_bytes(r, plan, stage) for stage in (0, 1))
    found = fullest(r, plan)
    assert first < last and (found.stage, found.peak) == (1, last)
    between = replace(GPU, memory=(first + last) // 2 / USABLE)
    fitting, misfits = search(r, plan, between, 2)
    assert not [c for c in fitting if c.recipe.parallel.pipeline == 2]
    (misfit,) = [m for m in misfits if m.recipe.parallel.pipeline == 2]
    assert "GiB on stage 1" in misfit.reason


@pytest.mark.parametrize(("spare", "fit"), [(0, True), (-1, False)])
def test_a_gpu_may_be_filled_to_the_last_byte_that_is_usable(recipe, monkeypatch, spare, fit):
    for planner in (module, overview):
        monkeypatch.setattr(planner, "USABLE", 1.0)
    r = recipe(model={"layers": 1, "hidden": 64, "heads": 1, "vocab_size": 256},
               train={"global_batch": 1, "micro_batch": 1, "tokens": 2560})
    plan = Plan.of(r)
    candidate = fullest(laid_out(r, 1, 1, 1, recompute="full"), plan)
    others = [fullest(laid_out(r, 1, 1, 1, recompute=how), plan).peak
              for how in ("none", "selective")]
    gpu = replace(GPU, memory=float(min(candidate.peak, *others) + spare))
    found, misfits = search(r, plan, gpu, 1)
    assert bool(found) is fit and bool(misfits) is not fit
    gpu = replace(GPU, memory=float(candidate.peak + spare))
    assert holds(r, plan, gpu, 1) is fit
    assert (smallest_world(r, plan, gpu) is not None) is fit
    gpu = replace(GPU, memory=float(fullest(r, plan).peak + spare))
    assert overview._own_layout(request(r, 1, gpu))["fits"] is fit


@pytest.mark.parametrize(("limit", "most", "less"), [
    ("LARGEST_INTERLEAVE", 3, 2), ("LARGEST_MICRO_BATCH", 16, 15)])
def test_the_search_goes_as_far_as_its_limits(recipe, monkeypatch, limit, most, less):
    """6 layers over 2 stages may be interleaved by 3, and 48 sequences cut into 16s."""
    def largest() -> int:
        variants = list(module._variants(gpt(recipe), 1, 2, 1))
        return max(r.parallel.interleave if limit == "LARGEST_INTERLEAVE" else r.train.micro_batch
                   for r in variants)

    monkeypatch.setattr(module, limit, most)
    assert largest() == most
    monkeypatch.setattr(module, limit, less)
    assert largest() < most


def test_the_largest_world_is_one_that_is_looked_at(recipe, monkeypatch):
    r = gpt(recipe)
    world = smallest_world(r, Plan.of(r), GPU).recipe.parallel.world
    monkeypatch.setattr(module, "LARGEST_WORLD", world)
    assert smallest_world(r, Plan.of(r), GPU).recipe.parallel.world == world
    monkeypatch.setattr(module, "LARGEST_WORLD", world - 1)
    assert smallest_world(r, Plan.of(r), GPU) is None


@pytest.mark.parametrize(("tensor", "length", "sequence"), [
    (1, 30, False), (2, 30, True), (2, 31, False), (3, 30, True), (4, 30, False)])
def test_sequences_are_split_wherever_they_can_be(recipe, tensor, length, sequence):
    r = recipe(train={"sequence_length": length})
    assert laid_out(r, tensor, 1, 1).parallel.sequence is sequence
