"""Step time: what a roofline, a pipeline and a ring must do, whatever the figures are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.rates import MEASURED, Rates
from megatron_spdf.planning.step_time import FLASH_BACKWARD, predicted_step, step_time
from megatron_spdf.planning.traffic import step_traffic
from megatron_spdf.schedule.flops import forward_flops
from megatron_spdf.sparsity.plan import Plan

GPU = GPUS["h100"]


def gpt(recipe, sparsity=0.0, parallel=None, **train):
    return recipe(model={"layers": 8, "hidden": 1024, "heads": 8, "vocab_size": 51200,
                         "max_positions": 512},
                  sparsity=sparsity, parallel=parallel or {},
                  train={"global_batch": 64, "micro_batch": 2, "sequence_length": 512, **train})


def times(r, gpu=GPU, efficiency=0.5, **rates):
    """Attention as fast as products and memory at its bandwidth, but for `rates`."""
    return predicted_step(r, Plan.of(r), gpu, replace(Rates(efficiency, 1.0, 1.0), **rates))


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


def sums(r) -> tuple[float, float]:
    """Seconds of the forward and the backward pass of one micro-batch, by FLOPs."""
    once = forward_flops(r.model, 512, None, "causal")
    tokens, rate = r.train.micro_batch * 512, 0.5 * GPU.bf16
    forward = tokens * (once.linear + once.attention + once.logits) / rate
    backward = tokens * (2 * once.linear + FLASH_BACKWARD * once.attention + 2 * once.logits) / rate
    return forward, backward


def test_padding_of_the_vocabulary_is_multiplied_too(recipe):
    r = recipe(model={"layers": 1, "hidden": 64, "heads": 2, "vocab_size": 129,
                      "max_positions": 512}, train={"sequence_length": 512})
    once = forward_flops(r.model, 512, None, "causal")
    logits = once.logits * 256 / 129
    flops = r.tokens_per_step * (3 * once.linear + 3 * logits + (1 + FLASH_BACKWARD)
                                 * once.attention)
    assert times(r, efficiency=0.5).compute == pytest.approx(flops / (0.5 * GPU.bf16), rel=1e-6)


@pytest.mark.parametrize(("link", "hidden"), [(1e15, False), (1e9, True)])
def test_half_of_tensor_parallel_traffic_runs_behind_backward(recipe, link, hidden):
    """That of the backward pass, beside the product of the weight's gradient, half of backward."""
    r, plan = (made := gpt(recipe, parallel={"tensor": 2})), Plan.of(made)
    sent = step_traffic(r, plan, 0)["tensor", "all-reduce"] * 1.0 / link  # of two ranks
    behind = min(sent / 2, 32 * sums(r)[1] / 2 / 2)  # 32 micro-batches, two ranks
    assert (behind < sent / 2) == hidden
    assert times(r, replace(GPU, link=link)).tensor == pytest.approx(sent - behind, rel=1e-3)


def test_the_loss_passes_over_the_logits_three_times(recipe):
    """In bf16; beside weight gradients: written and read in bf16, read and written in fp32."""
    small, large = (times(recipe(
        model={"layers": 1, "hidden": 64, "heads": 2, "vocab_size": v, "max_positions": 512},
        train={"sequence_length": 512, "global_batch": 8, "micro_batch": 2})).memory
        for v in (128, 128 * 9))
    moved = 4 * 1024 * (3 * 2 * 1024 + (2 + 2 + 8) * 64)
    assert large - small == pytest.approx(moved / GPU.memory_bandwidth, rel=1e-6)


def test_weights_are_expanded_once_a_step_or_twice_a_micro_batch(recipe):
    step, layer = (gpt(recipe, {"level": 0.75, "dense_copy": copy})
                   for copy in ("per_step", "per_layer"))
    weights = 12 * 8 * 1024**2
    once = 2 * (1 + 0.25) * weights + weights / 8  # bf16, and the mask's bits
    assert times(layer).memory - times(step).memory == pytest.approx(
        (2 * 32 - 1) * once / GPU.memory_bandwidth, rel=1e-6)


@pytest.mark.parametrize(("link", "network"), [(450e9, 5e9), (1e9, 50e9)])
def test_a_group_of_several_nodes_sends_over_all_their_cards(recipe, link, network):
    """A ring of 16 ranks on two nodes: eight cards lead out of each, or its links are slower."""
    r = gpt(recipe, parallel={"data": 16, "overlap": False})
    gpu = replace(GPU, link=link, network=network)
    weights = sum(w.numel for w in r.model.weights())
    sent = (4 + 2) * weights * 15 / 16
    assert times(r, gpu).data == pytest.approx(max(sent / link, sent / (8 * network)), rel=0.01)


@pytest.mark.parametrize(("interleave", "share"), [(1, 1.0), (2, 0.5)])
def test_a_later_stage_sends_while_it_waits_for_the_first(recipe, interleave, share):
    """Gradients for a backward pass of one of its chunks, parameters for a forward pass."""
    r = recipe(model={"layers": 4, "hidden": 512, "heads": 4, "vocab_size": 500_000,
                      "max_positions": 512}, train={"global_batch": 32, "micro_batch": 2},
               parallel={"pipeline": 2, "data": 2, "interleave": interleave})
    plan, slow = Plan.of(r), replace(GPU, link=1e9)
    once = forward_flops(r.model, 512, None, "causal")
    layers = (once.linear + (1 + FLASH_BACKWARD) / 3 * once.attention) / 2
    whole = 3 * 1024 * (layers + once.logits * 500_096 / 500_000) / (0.5 * GPU.bf16)
    sent = step_traffic(r, plan, 1)
    traffic = (sent["gradients", "reduce-scatter"] + sent["parameters", "all-gather"]) / 2 / 1e9
    assert times(r, slow).data == pytest.approx(traffic - share * whole, rel=1e-3)


def test_zero_2_hides_every_micro_batchs_gradients_behind_its_own_backward(recipe):
    slow = replace(GPU, link=1e9)
    for zero, rounds in ((1, 1), (2, 32)):
        r = gpt(recipe, parallel={"data": 2, "zero_stage": zero}, global_batch=128)
        r = r.model_copy(update={"engine": "deepspeed"})
        sent = step_traffic(r, Plan.of(r), 0)
        traffic = (sent["gradients", "all-reduce"] + sent["parameters", "all-gather"] / 2) / 1e9
        forward, backward = sums(r)
        hidden = rounds * (backward + forward if zero == 1 else backward)
        parameters = sent["parameters", "all-gather"] / 2 / 1e9
        if zero == 2:  # gathered once, and counted in as many parts
            hidden += rounds * min(forward, parameters / rounds)
        assert times(r, slow).data == pytest.approx(traffic - hidden, rel=1e-6), zero


def test_attention_and_memory_have_rates_of_their_own(recipe):
    r = gpt(recipe, sparsity=0.75)
    whole, once = times(r), forward_flops(r.model, 512, None, "causal")
    slow = times(r, attention=0.4, memory=0.25)
    attention = r.tokens_per_step * (1 + FLASH_BACKWARD) * once.attention / (0.5 * GPU.bf16)
    assert slow.compute - whole.compute == pytest.approx(attention * (1 / 0.4 - 1), rel=1e-6)
    assert slow.memory == pytest.approx(4 * whole.memory)
    assert slow.update == whole.update


@pytest.mark.parametrize(("sparsity", "rate"), [
    ({"level": 0.75, "pattern": "tile", "tile": 64}, 0.25 / 0.4),
    ({"level": 0.75, "pattern": "tile", "tile": 128}, 0.25 / 0.8),
    ({"level": 0.75, "pattern": "tile", "tile": 32}, 0.25 / 0.4),  # as the smallest measured one
    ({"level": 0.5, "pattern": "2:4"}, 1 / 1.6), ({"level": 0.75}, 1.0)])
def test_a_patterns_products_have_the_rate_that_was_measured(recipe, sparsity, rate):
    patterns = {"tile 64": 0.4, "tile 128": 0.8, "2:4": 1.6}
    r = gpt(recipe, sparsity)
    once = forward_flops(r.model, 512, None, "causal")
    linear = r.tokens_per_step * 3 * once.linear / (0.5 * GPU.bf16)
    found = times(gpt(recipe)).compute - times(r, patterns=patterns).compute
    assert found == pytest.approx(linear * (1 - rate), rel=1e-6)


def test_a_step_takes_as_long_as_its_launches(recipe):
    """Of 8 layers in 32 micro-batches, by the pattern that takes the host longest; one that was not
    measured counts as unstructured, and a CUDA graph is launched at once."""
    host = {"dense": 1.0, "unstructured": 2.0, "2:4": 3.0}
    tiles = {"level": 0.75, "pattern": "tile", "tile": 64}
    for sparsity, seconds in ((0.0, 1.0), (0.75, 2.0), ({"level": 0.5, "pattern": "2:4"}, 3.0),
                              (tiles, 2.0)):
        r = gpt(recipe, sparsity)
        assert times(r, host=host).total == pytest.approx(8 * 32 * seconds)
        assert times(r, host={"unstructured": 1e-6}).host == 0.0
    graphed = r.model_copy(update={"kernels": r.kernels.model_copy(update={"cuda_graph": True})})
    assert times(graphed, host=host) == times(r)


def test_an_efficiency_that_is_given_holds_the_host(recipe):
    r = gpt(recipe)
    assert step_time(r, Plan.of(r), GPU, 0.5) == times(r, attention=MEASURED.attention,
                                                       memory=MEASURED.memory)
    assert step_time(r, Plan.of(r), GPU) == times(r, **vars(MEASURED))
