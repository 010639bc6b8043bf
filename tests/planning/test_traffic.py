"""Traffic by hand; tests/distributed/test_planning.py holds it against what the collectives are
handed."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_spdf.engine.table import deepspeed
from megatron_spdf.planning.buffers import lay_out
from megatron_spdf.planning.traffic import classify, route, step_traffic, wire_share
from megatron_spdf.sparsity.plan import Plan

SBH = 2 * 2 * 32 * 64  # bytes of (T, B, h) in bf16
MICRO_BATCHES = 4


def sent(recipe, stage=0, sparsity=0.0, **parallel) -> Counter:
    r = recipe(parallel=parallel, sparsity=sparsity,
               train={"global_batch": 8 * parallel.get("data", 1)})
    plan = Plan.of(r)
    return step_traffic(r, plan, stage)


def test_one_rank_sends_nothing(recipe):
    assert not sent(recipe)


def test_tensor_parallelism_reduces_four_times_a_block(recipe):
    """And the embedding once, the gradient of the LM head's input once, and three numbers a token
    for the loss."""
    found = sent(recipe, tensor=2)
    assert found["tensor", "all-reduce"] == MICRO_BATCHES * ((4 * 4 + 2) * SBH + 3 * 4 * 2 * 32)


def test_sequence_parallelism_gathers_its_inputs_twice(recipe):
    """But for the LM head's, whose gradients are made in the forward pass; and the embedding's
    gradient once."""
    found = sent(recipe, tensor=2, sequence=True)
    assert found["tensor", "reduce-scatter"] == MICRO_BATCHES * (4 * 4 + 1) * SBH
    assert found["tensor", "all-gather"] == MICRO_BATCHES * (6 * 4 + 2) * SBH


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_ranks_that_share_query_groups_gather_the_fused_matrix(recipe, layers):
    """Once in the forward pass of every layer, again where it is repeated; its gradient is summed
    and cut once."""
    def fused(recompute: str) -> tuple[int, int]:
        made = recipe(model={"layers": layers, "heads": 8, "query_groups": 2},
                      parallel={"tensor": 4}, train={"global_batch": 8, "recompute": recompute})
        found = step_traffic(made, Plan.of(made), 0)
        return found["tensor", "all-gather"], found["tensor", "reduce-scatter"]

    rows = 64 + 2 * 2 * 8  # of queries, keys and values: 8 heads and twice 2 groups of 8
    once = MICRO_BATCHES * 2 * (2 * 32) * rows * layers
    assert fused("none") == (once, once)
    assert fused("full") == (2 * once, once)


@pytest.mark.parametrize(("interleave", "sends"), [(1, [1, 2, 2, 1]), (2, [3, 4, 4, 3])])
def test_stages_send_forward_and_back(recipe, interleave, sends):
    for stage, times in enumerate(sends):
        found = sent(lambda **s: recipe(model={"layers": 8}, **s), stage, pipeline=4,
                     interleave=interleave)
        assert found["pipeline", "send"] == MICRO_BATCHES * times * SBH
        assert bool(found["embedding", "all-reduce"]) == (stage in (0, 3))


@pytest.mark.parametrize(("zero", "keys"), [(0, {("gradients", "all-reduce"): 4}),
                                            (1, {("gradients", "reduce-scatter"): 4,
                                                 ("parameters", "all-gather"): 2})])
def test_data_parallelism_sends_the_buffers(recipe, zero, keys):
    r = recipe(parallel={"data": 2, "zero_stage": zero}, sparsity=0.75)
    plan = Plan.of(r)
    (buffer,) = lay_out(r.model, r.parallel, plan, 0, True)
    found = step_traffic(r, plan, 0)
    assert {k: found[k] for k in keys} == {k: each * buffer.elements for k, each in keys.items()}


@pytest.mark.parametrize(("layout", "size"), [
    ({"data": 2, "zero_stage": 0}, 8), ({"data": 2, "zero_stage": 1}, 12),
    ({"tensor": 2, "zero_stage": 0}, 12), ({"pipeline": 2, "data": 2, "zero_stage": 0}, 12)])
def test_loss_and_stop_flag_are_agreed_on_and_the_norm_where_shards_differ(recipe, layout, size):
    assert sent(recipe, **layout)["control", "all-reduce"] == size


@pytest.mark.parametrize("bound", ["PERSISTENT", "REUSE"])
def test_zero_3_keeps_a_parameter_of_the_most_and_reuses_as_many_as_it_may(recipe, monkeypatch,
                                                                           bound):
    """DeepSpeed's thresholds are the largest that are kept, and the most that are used again."""
    r = recipe(engine="deepspeed", parallel={"data": 2, "zero_stage": 3},
               train={"global_batch": 16})
    plan, sizes = Plan.of(r), [w.numel for w in r.model.weights()]
    at = max(sizes) if bound == "PERSISTENT" else sum(sizes)
    monkeypatch.setattr(deepspeed, "PERSISTENT", 0)
    found = []
    for value in (at, at - 1):
        monkeypatch.setattr(deepspeed, bound, value)
        found.append(step_traffic(r, plan, 0)["parameters", "all-gather"])
    large = sum(n for n in sizes if n == at)
    if bound == "PERSISTENT":
        assert found == [2 * sum(sizes), 2 * (sum(sizes) + (MICRO_BATCHES - 1) * large)]
    else:
        assert found == [2 * MICRO_BATCHES * sum(sizes), 2 * 2 * MICRO_BATCHES * sum(sizes)]


@pytest.mark.parametrize(("layers", "times"), [(4, 1), (128, 2)])
def test_zero_3_gathers_again_for_backward_what_is_long_ago(recipe, layers, times):
    """Of more than 1e9 elements, but for parameters of up to 100,000, which stay for the step."""
    r = recipe(model={"layers": layers, "hidden": 1024}, engine="deepspeed",
               parallel={"data": 2, "zero_stage": 3}, train={"global_batch": 16})
    sizes = [w.numel for w in r.model.weights()]
    small = sum(n for n in sizes if n <= 100_000)
    assert (sum(sizes) > 1e9) == (times == 2)
    found = step_traffic(r, Plan.of(r), 0)
    assert found["parameters", "all-gather"] == 2 * (
        small + MICRO_BATCHES * times * (sum(sizes) - small))
    assert found["gradients", "reduce-scatter"] == 4 * MICRO_BATCHES * sum(sizes)


def test_compact_gradients_follow_the_active_weights(recipe):
    dense, sparse = (sent(recipe, sparsity=s, data=2)["gradients", "reduce-scatter"]
                     for s in (0.0, 0.75))
    assert dense - sparse == pytest.approx(0.75 * 4 * 12 * 4 * 64**2, rel=1e-3)  # of padding


@pytest.mark.parametrize(("kind", "parallel", "link", "ranks", "lanes"), [
    ("tensor", {"tensor": 4, "data": 4}, "inside node", 4, 4),
    ("gradients", {"tensor": 4, "data": 2}, "inside node", 2, 2),
    ("gradients", {"tensor": 4, "data": 4}, "between nodes", 4, 2),
    ("gradients", {"data": 64}, "between nodes", 64, 8),
    ("pipeline", {"tensor": 2, "pipeline": 4}, "inside node", 4, 4),
    ("pipeline", {"tensor": 4, "pipeline": 4, "data": 2}, "between nodes", 4, 1),
    ("control", {"data": 16}, "between nodes", 16, 8),
    ("embedding", {"tensor": 4, "pipeline": 4, "data": 2}, "between nodes", 2, 1),
    ("embedding", {"pipeline": 8}, "inside node", 2, 2),
    ("embedding", {"pipeline": 16}, "between nodes", 2, 1),
])
def test_route(recipe, kind, parallel, link, ranks, lanes):
    way = route(kind, recipe(parallel=parallel), gpus_per_node=8)
    assert (way.link, way.ranks, way.lanes) == (link, ranks, lanes)


def test_routes_agree_with_the_numbering_of_ranks(recipe):
    """Every group's ranks, numbered as Megatron-Core numbers them, on the nodes they are on."""
    r = recipe(parallel={"tensor": 4, "pipeline": 2, "data": 4})
    ranks = [(pipeline, data, tensor) for pipeline in range(2) for data in range(4)
             for tensor in range(4)]
    node = {place: number // 8 for number, place in enumerate(ranks)}
    for kind, varies in (("pipeline", 0), ("gradients", 1), ("tensor", 2)):
        groups: dict[tuple, set[int]] = {}
        for place in ranks:
            groups.setdefault(tuple(v for i, v in enumerate(place) if i != varies),
                              set()).add(node[place])
        crosses = any(len(nodes) > 1 for nodes in groups.values())
        assert route(kind, r, 8).link == ("between nodes" if crosses else "inside node")


@pytest.mark.parametrize(("operation", "ranks", "share"),
                         [("all-reduce", 2, 1.0), ("all-reduce", 8, 1.75),
                                                           ("all-gather", 8, 0.875),
                          ("send", 2, 1.0)])
def test_rings(operation, ranks, share):
    assert wire_share(operation, ranks) == share


@pytest.mark.parametrize(("counted", "meant"), [
    (("_allgather_base", "TENSOR_MODEL_PARALLEL_GROUP"), ("tensor", "all-gather")),
    (("_reduce_scatter_base", "TENSOR_MODEL_PARALLEL_GROUP"), ("tensor", "reduce-scatter")),
    (("reduce_scatter_tensor_coalesced", "DATA_PARALLEL_GROUP_WITH_CP"),
     ("gradients", "reduce-scatter")),
    (("allgather_into_tensor_coalesced", "DATA_PARALLEL_GROUP_WITH_CP"),
     ("parameters", "all-gather")),
    (("allreduce_coalesced", "DATA_PARALLEL_GROUP_WITH_CP"), ("gradients", "all-reduce")),
    (("send", "default_pg"), ("pipeline", "send")),
    (("allreduce", "default_pg"), ("control", "all-reduce")),
])
def test_names_of_the_counter(counted, meant):
    assert classify(*counted) == meant
