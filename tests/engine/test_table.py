"""What data-parallel ranks send in a step, by hand, and which optimizer state lies on a GPU."""

from __future__ import annotations

import pytest

from megatron_spdf.engine.table import deepspeed
from megatron_spdf.planning.buffers import local_parameters
from megatron_spdf.recipe.recipe import ENGINES
from megatron_spdf.sparsity.plan import Plan

MICRO_BATCHES = 3


@pytest.fixture
def of(recipe):
    """A DeepSpeed run on two replicas with three micro-batches each, and its parameters."""
    def make(stage: int, precision: str = "fp32", **parallel):
        made = recipe(engine="deepspeed", sparsity=0.75, parallel={
            "data": 2, "zero_stage": stage, **parallel}, train={
            "global_batch": 12, "micro_batch": 2, "precision": precision})
        assert made.micro_batches == MICRO_BATCHES
        plan = Plan.of(made)
        (chunk,) = local_parameters(made.model, made.parallel, plan, 0)
        return made, plan, [parameter.elements for parameter in chunk]
    return make


def traffic(made, plan) -> dict:
    found = ENGINES.get("deepspeed").data_traffic(made, plan, 0, on_gpu=False)
    return {key: count for key, count in found.items() if count}


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_travel_once_or_for_every_micro_batch(of, stage, precision, width):
    made, plan, parameters = of(stage, precision)
    total = sum(parameters)
    times = MICRO_BATCHES if stage == 2 else 1
    gathered = {("parameters", "all-gather"): width * total} if stage else {}
    assert traffic(made, plan) == {("gradients", "all-reduce"): 4 * total * times, **gathered}


@pytest.mark.parametrize(("reuse", "gathers"), [(10**9, 1), (10**3, 2)])
def test_parameters_are_gathered_for_every_micro_batch_and_small_ones_once(of, monkeypatch, reuse,
                                                                           gathers):
    made, plan, parameters = of(3)
    total, limit = sum(parameters), 2000
    small = sum(n for n in parameters if n <= limit)
    assert 0 < small < total
    monkeypatch.setattr(deepspeed, "PERSISTENT", limit)
    monkeypatch.setattr(deepspeed, "REUSE", reuse)
    assert traffic(made, plan) == {
        ("gradients", "reduce-scatter"): 4 * total * MICRO_BATCHES,
        ("parameters", "all-gather"): 4 * (small + MICRO_BATCHES * gathers * (total - small))}


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_state_is_not_on_the_gpu(of, offload):
    made, plan, _ = of(2, "bf16", offload=offload)
    held = ENGINES.get("deepspeed").rank_bytes(made, plan, 0, on_gpu=True, data_rank=0)
    assert (held.master == 0 and held.moments == 0) == offload
    assert held.parameters > 0 and held.gradients > 0
