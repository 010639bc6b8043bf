"""Bytes per rank: a case counted by hand, ZeRO's stages, proportion to active weights, placement on
stages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spdf.architecture.base import EMBEDDING, HEAD
from megatron_spdf.planning.buffers import _fill, lay_out, layers_of, local_parameters
from megatron_spdf.planning.memory import RankBytes, rank_bytes, render_layout, zero_bytes
from megatron_spdf.planning.moves import moves_of
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.sparsity.algorithms.base import MovingMasks
from megatron_spdf.sparsity.plan import Plan

PRETRAIN = Path(__file__).resolve().parents[2] / "configs" / "pretrain"


def small(recipe, precision="bf16", zero_stage=1, recompute="none"):
    return recipe(model={"layers": 2, "hidden": 8, "heads": 2, "vocab_size": 100,
                         "max_positions": 16}, sparsity=0.75,
                  train={"precision": precision, "recompute": recompute},
                  parallel={"tensor": 2, "data": 2, "zero_stage": zero_stage})


# On one of two tensor-parallel ranks, per layer: 96 of 384 sparse weights active (24 of 96, 8 of
# 32, 32 of 128, 32 of 128), biases 12 + 8 + 16 + 8, norms 4 * 8. Beside the layers: embedding 128
# (padded) * 8 / 2, positions 16 * 8, last norm 2 * 8.
LOCAL = 2 * (96 + 44 + 32) + 512 + 128 + 16
# With ZeRO-1 each of the 28 parameters begins at a multiple of 64 elements: only the embedding and
# the positions are longer than that, and the bucket ends at a multiple of 128.
PADDED = 26 * 64 + 128 + 512


# On a GPU one count for each of two layers' four weights, whose chunks are shorter than a span; on
# CPU all positions.
@pytest.mark.parametrize("on_gpu, derived", [(True, 2 * 4 * 4), (False, 2 * 96 * 8)])
def test_bytes_counted_by_hand(recipe, on_gpu, derived):
    r = small(recipe, zero_stage=0)
    assert LOCAL == 1000
    assert rank_bytes(r, Plan.of(r), 0, on_gpu) == RankBytes(
        parameters=2 * 1000, gradients=4 * 1000, master=4 * 1000, moments=8 * 1000,
        expanded=2 * 2 * 384, masks=2 * (12 + 4 + 16 + 16) + derived)


def test_padding_counted_by_hand(recipe):
    r = small(recipe)
    found = rank_bytes(r, Plan.of(r), 0, True)
    assert PADDED == 2304
    assert (found.parameters, found.gradients) == (2 * PADDED, 4 * PADDED)


@pytest.mark.parametrize("data", [1, 2, 3, 8])
@pytest.mark.parametrize("pipeline, interleave", [(1, 1), (2, 1), (2, 2)])
def test_shards_of_zero_1_hold_every_element_once(recipe, data, pipeline, interleave):
    r = recipe(parallel={"data": data, "pipeline": pipeline, "interleave": interleave},
               sparsity=0.5)
    plan = Plan.of(r)
    for stage in range(pipeline):
        elements = sum(q.elements for chunk in local_parameters(r.model, r.parallel, plan, stage)
                       for q in chunk)
        buffers = lay_out(r.model, r.parallel, plan, stage, True)
        owned = [sum(b.shard(rank, data) for b in buffers) for rank in range(data)]
        assert sum(owned) == elements
        moments = [rank_bytes(r, Plan.of(r), stage, True, rank).moments for rank in range(data)]
        assert moments == [8 * n for n in owned]


@pytest.mark.parametrize(("data", "least"), [(2, 40e6), (64, 64e6)])
def test_buckets_grow_with_the_ranks_and_only_the_first_chunk_has_several(recipe, data, least):
    """Megatron-Core's 40 million elements, or a million for each data-parallel rank."""
    r = recipe(model={"layers": 16, "hidden": 1024, "vocab_size": 50257},
               parallel={"data": data, "pipeline": 2, "interleave": 2})
    plan = Plan.of(r)
    first, other = lay_out(r.model, r.parallel, plan, 0, True)
    sizes = [end - start for start, end in first.buckets]
    largest = 4 * 1024**2 + 64
    # from the last layer to the first, and the tied embedding, which lies on two stages, alone
    *regular, rest, embedding = sizes
    assert regular or data == 64
    assert all(least <= n <= least + largest for n in regular) and rest < least + largest
    assert embedding == 50304 * 1024
    for buffers in (lay_out(r.model, r.parallel, plan, 1, True),
                    lay_out(r.model, r.parallel, plan, 0, False)):
        assert len(buffers[0].buckets) <= 2
    assert len(other.buckets) == 1


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_state_that_is_gathered_for_a_move(recipe, zero_stage):
    """The master weights twice, to choose by and to carry, and two moments, 4 bytes each."""
    for data in (1, 2):
        r = recipe(sparsity={"level": 0.75, "algorithm": "static"},
                   parallel={"data": data, "zero_stage": zero_stage})
        (buffer,) = lay_out(r.model, r.parallel, Plan.of(r), 0, True)
        assert moves_of(r, Plan.of(r), 0).carried == (
            4 * 4 * buffer.elements if data > 1 and zero_stage else 0)


class Gradients(MovingMasks):
    """Needs the dense gradient."""

    name, needs = "gradients", "dense_gradient"


@pytest.mark.parametrize("data", [1, 2])
def test_a_dense_gradient_is_held_by_all_and_summed_up_by_replicas(recipe, data):
    r = recipe(sparsity=0.75, parallel={"data": data, "tensor": 2})
    moving = r.sparsity.model_copy(update={"update": Gradients(every=8, stop=1.0)})
    r = r.model_copy(update={"sparsity": moving})
    found, dense = moves_of(r, Plan.of(r), 0), 4 * 4 * 12 * 64**2 // 2
    assert (found.transient, found.reduced) == (dense, dense * (data > 1))
    assert found.count == 1  # at step 8 of 10


def test_offloaded_state_is_not_on_the_gpu(recipe):
    for offload in (False, True):
        r = recipe(engine="deepspeed", parallel={"data": 2, "offload": offload})
        found = rank_bytes(r, Plan.of(r), 0, True)
        weights = sum(w.numel for w in r.model.weights())
        assert found.optimizer == (0 if offload else 12 * weights // 2)
        assert found.gradients == 4 * weights


def test_total_is_the_sum(recipe):
    r = small(recipe, zero_stage=0)
    assert rank_bytes(r, Plan.of(r), 0, True).total == 2000 + 4000 + 12000 + 1536 + 96 + 32


def test_fp32_needs_no_master_weights(recipe):
    r = small(recipe, precision="fp32", zero_stage=0)
    found = rank_bytes(r, Plan.of(r), 0, True)
    assert (found.parameters, found.gradients, found.master, found.moments) == (4000, 4000, 0, 8000)
    assert (found.optimizer, found.expanded) == (8000, 4 * 2 * 384)


# Bytes a parameter, K = 12 for Adam in mixed precision (Rajbhandari et al. 2020, figure 1;
# gradients fp32 here).
@pytest.mark.parametrize("stage, each",
                         [(0, 2 + 4 + 12), (1, 2 + 4 + 12 / 2), (2, 2 + 4 / 2 + 12 / 2),
                          (3, 18 / 2)])
def test_zero_stages(recipe, stage, each):
    r = small(recipe)
    found = zero_bytes(r, Plan.of(r), 0, stage)
    assert found.parameters + found.gradients + found.optimizer == each * 1000
    assert found.masks == 96 + 32
    assert (found.expanded, found.gathered) == (2 * 2 * 384,
                                                2 * 2 * (96 + 44 + 32) if stage == 3 else 0)


def test_zero_3_keeps_no_dense_weight_of_a_block_that_is_recomputed(recipe):
    r = small(recipe, recompute="full")
    # both blocks are gathered, compact values and what they expand to
    found = zero_bytes(r, Plan.of(r), 0, 3)
    assert (found.expanded, found.gathered) == (0, 2 * 2 * (96 + 44 + 32 + 384))


@pytest.mark.parametrize("stage", [0, 1])
def test_zero_stages_of_the_engine_differ_by_padding_alone(stage):
    r = load_recipe(PRETRAIN / "gpt3_xl_s75.yaml", [f"parallel.zero_stage={stage}"])
    engine, plain = rank_bytes(r, Plan.of(r), 0, True), zero_bytes(r, Plan.of(r), 0, stage)
    assert engine.total == pytest.approx(plain.total, rel=1e-3)


def test_no_other_zero_stage(recipe):
    with pytest.raises(ValueError, match="0, 1, 2 and 3, not 4"):
        zero_bytes(small(recipe), Plan.of(small(recipe)), 0, 4)


@pytest.mark.parametrize("name", ["gpt2_small", "gpt3_xl"])
@pytest.mark.parametrize("what", ["parameters", "gradients", "optimizer"])
def test_sparse_layers_take_a_quarter_at_75_percent(name, what):
    dense, sparse = (load_recipe(PRETRAIN / f"{name}_{level}.yaml") for level in ("dense", "s75"))
    before, after = (getattr(rank_bytes(r, Plan.of(r), 0, True), what) for r in (dense, sparse))
    weights = dense.model.weights()
    in_sparse_layers = before * sum(w.numel for w in weights
                                    if w.linear) / sum(w.numel for w in weights)
    rest = before - in_sparse_layers
    assert 0.24 <= (after - rest) / in_sparse_layers <= 0.27


def test_dense_run_expands_and_masks_nothing(recipe):
    r = recipe()
    assert (rank_bytes(r, Plan.of(r), 0, True).expanded,
            rank_bytes(r, Plan.of(r), 0, True).masks) == (0, 0)


@pytest.mark.parametrize("pipeline, interleave, layers",
                         [(1, 1, 4), (2, 1, 4), (4, 1, 8), (2, 2, 8), (2, 4, 8),
                                                          (4, 3, 24)])
def test_layers_of_a_stage_are_megatrons(recipe, pipeline, interleave, layers):
    r = recipe(model={"layers": layers}, parallel={"pipeline": pipeline, "interleave": interleave})
    per_chunk = layers // (pipeline * interleave)
    for rank in range(pipeline):
        held = [[(chunk * pipeline + rank) * per_chunk + i for i in range(per_chunk)]
                for chunk in range(interleave)]
        assert [[n for n in chunk if 0 <= n < layers]
                for chunk in layers_of(r.model, r.parallel, rank)] == held
        assert (-1 in layers_of(r.model, r.parallel, rank)[0]) == (rank == 0)
        assert (layers in layers_of(r.model, r.parallel, rank)[-1]) == (rank == pipeline - 1)


@pytest.mark.parametrize("pipeline, interleave", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_every_weight_is_on_one_stage_and_the_tied_embedding_on_both_ends(recipe, pipeline,
                                                                          interleave):
    r = recipe(parallel={"pipeline": pipeline, "interleave": interleave})
    plan = Plan.of(r)
    held = [local_parameters(r.model, r.parallel, plan, stage) for stage in range(pipeline)]
    stages = [[q.name for chunk in chunks for q in chunk] for chunks in held]
    twice = [HEAD] if pipeline > 1 else []
    assert sorted(sum(stages, [])) == sorted([w.name for w in r.model.weights()] + twice)
    assert EMBEDDING in stages[0]
    assert pipeline == 1 or stages[-1][-1] == HEAD


def test_stages_together_hold_the_model_and_a_second_embedding(recipe):
    r = recipe(sparsity=0.5, parallel={"pipeline": 4, "zero_stage": 0})
    one = recipe(sparsity=0.5, parallel={"zero_stage": 0})
    together = sum(rank_bytes(r, Plan.of(r), stage, True).parameters for stage in range(4))
    assert together - rank_bytes(one, Plan.of(one), 0, True).parameters == 2 * 256 * 64


def test_layout_is_shown_with_a_row_for_each_stage(recipe):
    r = recipe(parallel={"pipeline": 2, "data": 2, "tensor": 2})
    text = render_layout(r, Plan.of(r))
    assert "8 ranks = tensor 2 x pipeline 2 x data 2" in text
    assert sum(line.strip().startswith("stage ") for line in text.splitlines()) == 2


def test_tiles_that_a_gpu_multiplies_are_not_expanded_there(recipe):
    blocks = {"level": 0.75, "pattern": "tile", "tile": 16}
    r = recipe(sparsity=blocks, model={"layers": 1, "ffn_hidden": 64}, train={"precision": "bf16"})
    gpu, cpu = (rank_bytes(r, Plan.of(r), 0, on_gpu) for on_gpu in (True, False))
    active, weights = 6 * 64 * 64 // 4, 6 * 64 * 64
    assert (gpu.expanded, cpu.expanded) == (0, 2 * weights)
    # One chunk a weight: counts for 12, 4, 4 and 4 spans of 1024 entries, and two tables of 24
    # active blocks.
    assert gpu.masks == weights // 8 + 4 * 24 + 2 * 4 * 24
    assert cpu.masks == weights // 8 + 8 * active


@pytest.mark.parametrize("pattern", ["unstructured", "tile"])
def test_expanding_layer_by_layer_keeps_no_copy(recipe, pattern):
    r = recipe(sparsity={"level": 0.75, "pattern": pattern, "tile": 8, "dense_copy": "per_layer"})
    assert [rank_bytes(r, Plan.of(r), 0, on_gpu).expanded for on_gpu in (True, False)] == [0, 0]


def test_a_bucket_ends_with_the_parameter_that_fills_it_and_none_is_empty():
    """As Megatron-Core's do; a tied embedding is alone in its own."""
    chunk = [SimpleNamespace(name=name, elements=128) for name in (EMBEDDING, "a", "b")]
    for limit, buckets in ((128, ((0, 128), (128, 256), (256, 384))),
                           (129, ((0, 256), (256, 384))), (None, ((0, 256), (256, 384)))):
        assert _fill(chunk, 2, True, limit).buckets == buckets
    assert _fill(chunk[1:], 0, True, None).buckets == ((0, 256),)
