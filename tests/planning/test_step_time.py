"""Step time: what a roofline, a pipeline and a ring must do, whatever the figures are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.step_time import FLASH_BACKWARD, step_time
from megatron_spdf.schedule.flops import forward_flops
from megatron_spdf.sparsity.plan import Plan

GPU = GPUS["h100"]


def gpt(recipe, sparsity=0.0, parallel=None, **train):
    return recipe(model={"layers": 8, "hidden": 1024, "heads": 8, "vocab_size": 51200,
                         "max_positions": 512},
                  sparsity=sparsity, parallel=parallel or {},
                  train={"global_batch": 64, "micro_batch": 2, "sequence_length": 512, **train})


def times(r, gpu=GPU, efficiency=0.5):
    return step_time(r, Plan.of(r), gpu,
                     efficiency)


def test_compute_is_flops_over_the_rate(recipe):
    r = gpt(recipe)
    once = forward_flops(r.model, 512, None, "causal")
    flops = r.tokens_per_step * (3 * once.linear + 3 * once.logits + (1 + FLASH_BACKWARD)
                                 * once.attention)
    assert times(r, efficiency=0.5).compute == pytest.approx(flops / (0.5 * GPU.bf16), rel=1e-6)


def test_sparse_products_run_at_the_dense_cost(recipe):
    assert times(gpt(recipe, sparsity=0.75)).compute == times(gpt(recipe)).compute


def test_full_recomputation_adds_a_forward_pass(recipe):
    none, full = (times(gpt(recipe, recompute=x)).compute for x in ("none", "full"))
    r = gpt(recipe)
    once = forward_flops(r.model, 512, None, "causal")
    again = r.tokens_per_step * (once.linear + once.attention) / (0.5 * GPU.bf16)
    assert full - none == pytest.approx(again, rel=1e-6)


@pytest.mark.parametrize(("interleave", "chunks"), [(1, 1), (2, 2)])
def test_bubble(recipe, interleave, chunks):
    """(p - 1) / m of a step's work on a stage, less by the number of chunks (Narayanan et al. 2021,
    section 2.2)."""
    found = times(gpt(recipe, parallel={"pipeline": 4, "interleave": interleave}))
    work = found.compute + found.memory + found.tensor + (found.pipeline if interleave == 1
                                                          else 0.0)
    # embedding and expansion once a step
    assert found.bubble == pytest.approx(3 / chunks / 32 * work, rel=0.02)


def test_one_rank_waits_for_nobody(recipe):
    found = times(gpt(recipe))
    assert found.tensor == found.pipeline == found.bubble == found.data == 0.0
    assert found.total == found.compute + found.memory + found.update


def test_overlap_hides_data_parallel_traffic(recipe):
    shown = [times(gpt(recipe, parallel={"data": 16, "overlap": o})).data for o in (False, True)]
    assert shown[1] < shown[0]
    fast, slow = (times(gpt(recipe, parallel={"data": 16}), replace(GPU, network=n)).data
                  for n in (1e12, 1e9))
    assert fast < slow


def test_a_slower_network_matters_between_nodes_only(recipe):
    slow = replace(GPU, network=GPU.network / 10)
    for parallel, slower in (({"data": 8, "overlap": False}, False),
                             ({"data": 16, "overlap": False}, True)):
        r = gpt(recipe, parallel=parallel)
        assert (times(r, slow).total > times(r).total) == slower


def test_sparse_runs_exchange_less(recipe):
    parallel = {"data": 16, "overlap": False}
    assert times(gpt(recipe, 0.75, parallel)).data < 0.6 * times(gpt(recipe, 0.0, parallel)).data


def test_the_slowest_stage_sets_the_pace(recipe):
    r = gpt(recipe, parallel={"pipeline": 2})
    even = forward_flops(r.model, 512, None, "causal")
    last = r.tokens_per_step * (1.5 * even.linear + 3 * even.logits + (1 + FLASH_BACKWARD) / 2
                                * even.attention)
    assert times(r, efficiency=0.5).compute == pytest.approx(last / (0.5 * GPU.bf16), rel=1e-6)


@pytest.mark.parametrize(("zero_stage", "data"), [(0, 8), (1, 8), (1, 1), (0, 1)])
def test_the_update_reads_and_writes_what_a_rank_updates(recipe, zero_stage, data):
    """Of every weight it updates 12 bytes of state and 4 of gradient are read and written, and the
    bf16 weights of the whole model are written."""
    r = gpt(recipe, parallel={"data": data, "zero_stage": zero_stage})
    weights = sum(w.numel for w in r.model.weights())
    updated = weights / (data if zero_stage == 1 else 1)
    moved = 2 * (12 + 4) * updated + 2 * weights
    assert times(r).update == pytest.approx(moved / GPU.memory_bandwidth, rel=0.01)
