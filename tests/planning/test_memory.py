"""Bytes per rank: a case counted by hand, proportion to active weights, placement of layers on stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spdf.config import load_recipe
from megatron_spdf.model.weights import EMBEDDING, model_weights
from megatron_spdf.planning.memory import RankBytes, rank_bytes, rank_weights, render_layout, stage_of
from megatron_spdf.sparsity.plan import make_plan

PRETRAIN = Path(__file__).resolve().parents[2] / "configs" / "pretrain"


def plan_of(recipe):
    return make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups)


def small(recipe, precision="bf16", zero_stage=1):
    return recipe(model={"layers": 2, "hidden": 8, "heads": 2, "vocab_size": 100, "max_positions": 16}, sparsity=0.75,
                  train={"precision": precision}, parallel={"tensor": 2, "data": 2, "zero_stage": zero_stage})


# On one of two tensor-parallel ranks, per layer: 96 of 384 sparse weights active (24 of 96, 8 of 32, 32 of 128, 32
# of 128), biases 12 + 8 + 16 + 8, norms 4 * 8. Beside the layers: embedding 128 (padded) * 8 / 2, positions 16 * 8,
# last norm 2 * 8.
LOCAL = 2 * (96 + 44 + 32) + 512 + 128 + 16


@pytest.mark.parametrize("on_gpu, position", [(True, 4), (False, 8)])
def test_bytes_counted_by_hand(recipe, on_gpu, position):
    r = small(recipe)
    assert LOCAL == 1000
    assert rank_bytes(r, plan_of(r), 0, on_gpu) == RankBytes(
        parameters=2 * 1000, gradients=4 * 1000, optimizer=12 * 1000 // 2, expanded=2 * 2 * 384,
        masks=2 * (12 + 4 + 16 + 16) + 2 * 96 * position)


def test_total_is_the_sum(recipe):
    r = small(recipe)
    assert rank_bytes(r, plan_of(r), 0, True).total == 2000 + 4000 + 6000 + 1536 + 96 + 768


def test_fp32_needs_no_master_weights(recipe):
    r = small(recipe, precision="fp32")
    found = rank_bytes(r, plan_of(r), 0, True)
    assert (found.parameters, found.gradients, found.optimizer, found.expanded) == (4000, 4000, 4000, 4 * 2 * 384)


def test_optimizer_state_is_whole_without_zero(recipe):
    r = small(recipe, zero_stage=0)
    assert rank_bytes(r, plan_of(r), 0, True).optimizer == 12 * 1000


@pytest.mark.parametrize("name", ["gpt2_small", "gpt3_xl"])
@pytest.mark.parametrize("what", ["parameters", "gradients", "optimizer"])
def test_sparse_layers_take_a_quarter_at_75_percent(name, what):
    dense, sparse = (load_recipe(PRETRAIN / f"{name}_{level}.yaml") for level in ("dense", "s75"))
    before, after = (getattr(rank_bytes(r, plan_of(r), 0, True), what) for r in (dense, sparse))
    weights = model_weights(dense.model)
    in_sparse_layers = before * sum(w.numel for w in weights if w.linear) / sum(w.numel for w in weights)
    rest = before - in_sparse_layers
    assert 0.24 <= (after - rest) / in_sparse_layers <= 0.27


def test_dense_run_expands_and_masks_nothing(recipe):
    r = recipe()
    assert (rank_bytes(r, plan_of(r), 0, True).expanded, rank_bytes(r, plan_of(r), 0, True).masks) == (0, 0)


@pytest.mark.parametrize("pipeline, interleave, layers", [(1, 1, 4), (2, 1, 4), (4, 1, 8), (2, 2, 8), (2, 4, 8),
                                                          (4, 3, 24)])
def test_stage_of_a_layer_is_megatrons(recipe, pipeline, interleave, layers):
    r = recipe(model={"layers": layers}, parallel={"pipeline": pipeline, "interleave": interleave})
    per_chunk = layers // (pipeline * interleave)
    for rank in range(pipeline):
        held = {(chunk * pipeline + rank) * per_chunk + i for chunk in range(interleave) for i in range(per_chunk)}
        assert {layer for layer in range(layers) if stage_of(layer, r) == rank} == held
    assert stage_of(-1, r) == 0 and stage_of(layers, r) == pipeline - 1


@pytest.mark.parametrize("pipeline, interleave", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_every_weight_is_on_one_stage_and_the_tied_embedding_on_both_ends(recipe, pipeline, interleave):
    r = recipe(parallel={"pipeline": pipeline, "interleave": interleave})
    held = [w.name for stage in range(pipeline) for w in rank_weights(r, stage)]
    twice = [EMBEDDING] if pipeline > 1 else []
    assert sorted(held) == sorted([w.name for w in model_weights(r.model)] + twice)
    assert [stage for stage in range(pipeline) if EMBEDDING in {w.name for w in rank_weights(r, stage)}] == (
        [0] if pipeline == 1 else [0, pipeline - 1])


def test_stages_together_hold_the_model_and_a_second_embedding(recipe):
    r = recipe(sparsity=0.5, parallel={"pipeline": 4})
    one = recipe(sparsity=0.5)
    together = sum(rank_bytes(r, plan_of(r), stage, True).parameters for stage in range(4))
    assert together - rank_bytes(one, plan_of(one), 0, True).parameters == 2 * 256 * 64


def test_layout_is_shown_with_a_row_for_each_stage(recipe):
    r = recipe(parallel={"pipeline": 2, "data": 2, "tensor": 2})
    text = render_layout(r, plan_of(r))
    assert "8 ranks = tensor 2 x pipeline 2 x data 2" in text
    assert sum(line.strip().startswith("stage ") for line in text.splitlines()) == 2
