"""Activations by hand and by Korthikanti et al. 2022; tests/distributed/test_planning.py holds them
against tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spdf.architecture.lm_head import LOGITS_BYTES, tokens_at_once
from megatron_spdf.planning.activations import (
    StepBytes,
    in_flight,
    kept_by_layer,
    layer_bytes,
    peak_bytes,
    step_bytes,
)
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan

XL = Path(__file__).resolve().parents[2] / "configs/pretrain/gpt3_xl_dense.yaml"


def gpt(recipe, layers=8, batch=64, dropout=0.0, sparsity=0.0, heads=4, groups=4, parallel=None,
        **train) -> Recipe:
    return recipe(model={"layers": layers, "hidden": 64, "heads": heads, "query_groups": groups,
                         "dropout": dropout},
                  sparsity=sparsity, train={"global_batch": batch, "micro_batch": 2,
                                            "sequence_length": 32,
                                            "precision": "bf16", **train}, parallel=parallel or {})


SBH = 32 * 2 * 64  # T B h


@pytest.mark.parametrize(("tensor", "sequence", "expected"), [
    (1, False, 34.0), (4, False, 10.0 + 24.0 / 4), (4, True, 34.0 / 4)])
def test_block_is_korthikantis_without_scores(recipe, tensor, sequence, expected):
    """Their table 2, s b h (34 + 5 a s / h) at t = 1, less the softmax terms that a flash kernel
    does not store."""
    r = gpt(recipe, dropout=0.1, parallel={"tensor": tensor, "sequence": sequence})
    parts = layer_bytes(r)
    flash, theirs_not = parts.pop("log-sum-exp"), parts.pop("norm statistics")
    assert sum(parts.values()) == expected * SBH
    assert (flash, theirs_not) == (4 * 64 * 4 // tensor, 16 * 64 // (tensor if sequence else 1))


def test_grouped_queries_keep_fewer_keys_and_a_copy_of_the_queries(recipe):
    many, few = (layer_bytes(gpt(recipe, groups=g))["queries, keys, values"] for g in (4, 2))
    assert many == 2 * 32 * 2 * (64 + 2 * 64) and few == 2 * 32 * 2 * (2 * 64 + 2 * 32)


def test_recomputation(recipe):
    none, selective, full = (kept_by_layer(gpt(recipe, recompute=r))
                             for r in ("none", "selective", "full"))
    assert none - selective == 4 * 64 * 4  # the log-sum-exp alone
    assert full == 2 * SBH


@pytest.mark.parametrize(("pipeline", "interleave", "batch", "expected"), [
    (1, 1, 64, [1]), (4, 1, 64, [4, 3, 2, 1]), (4, 1, 4, [2, 2, 2, 1]),  # two micro-batches in all
    (2, 2, 64, [5, 3]), (4, 2, 64, [11, 9, 7, 5])])
def test_micro_batches_in_flight(recipe, pipeline, interleave, batch, expected):
    r = gpt(recipe, batch=batch, parallel={"pipeline": pipeline, "interleave": interleave})
    assert [in_flight(r, stage) for stage in range(pipeline)] == expected


def test_activations_of_a_pipeline(recipe):
    r = gpt(recipe, parallel={"pipeline": 4})
    stages = [step_bytes(r, Plan.of(r), s) for s in range(4)]
    block = kept_by_layer(r)
    assert [s.running + s.waiting for s in stages] == [2 * n * block for n in (4, 3, 2, 1)]
    assert [s.pipeline for s in stages] == [2 * n * SBH for n in (4, 3, 2, 0)]
    assert [bool(s.head) for s in stages] == [False, False, False, True]


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_the_head_counted_by_hand(recipe, tensor, sequence):
    """Logits, which become their gradients, beside the gradient of the head's weight; the norm's
    input and output, 8 bytes of its statistics a token; the gradient of the head's input, and that
    input where it is gathered."""
    r = gpt(recipe, parallel={"tensor": tensor, "sequence": sequence})
    tokens, share = 32 * 2, (tensor if sequence else 1)
    logits = 2 * (tokens + 64) * 256 // tensor
    inputs = 2 * 2 * SBH // share + 8 * tokens // share + 2 * SBH * (2 if sequence else 1)
    assert step_bytes(r, Plan.of(r), 0).head == logits + inputs


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_the_backward_of_the_last_matrix_counted_by_hand(recipe, tensor, sequence):
    """The gradients of its output, gathered under sequence parallelism, of its input, and of
    itself, and the tied embedding's, which waits."""
    r = gpt(recipe, parallel={"tensor": tensor, "sequence": sequence})
    share = tensor if sequence else 1
    output = 2 * SBH // share + (2 * SBH if sequence else 0)
    matrix = 2 * (4 * SBH + 4 * 64 * 64) // tensor
    assert step_bytes(r, Plan.of(r), 0).workspace == output + matrix + 2 * 256 * 64 // tensor


@pytest.mark.parametrize(("pipeline", "stage", "embeddings"), [(1, 0, 3), (2, 0, 1), (2, 1, 0)])
def test_the_end_of_backward_counted_by_hand(recipe, pipeline, stage, embeddings):
    """The embedding's gradients from the LM head, the look-up and their sum; or, with the first of
    these, five tensors between layers and the gradients of queries, keys and values."""
    r = gpt(recipe, parallel={"pipeline": pipeline})
    vocabulary = 2 * 256 * 64
    between = (vocabulary if pipeline == 1 else 0) + 5 * 2 * SBH + 3 * 2 * SBH
    assert step_bytes(r, Plan.of(r), stage).late == max(between, embeddings * vocabulary)
    wide = recipe(model={"hidden": 8, "heads": 4, "vocab_size": 50257},
                  train={"sequence_length": 4, "micro_batch": 1, "precision": "bf16"},
                  parallel={"pipeline": pipeline})
    assert (step_bytes(wide, Plan.of(wide), stage).late // (2 * 50304 * 8)) == embeddings


@pytest.mark.parametrize(("interleave", "chunks"), [(1, [2, 1]), (2, [5, 3])])
def test_what_the_embedding_keeps_and_stages_send(recipe, interleave, chunks):
    """9 bytes a token of every micro-batch in flight, where the vocabulary is cut; outputs of every
    chunk in flight, but the model's last one has nobody to send to where it is a stage's only."""
    r = gpt(recipe, parallel={"tensor": 2, "pipeline": 2, "interleave": interleave})
    first, last = (step_bytes(r, Plan.of(r), stage) for stage in (0, 1))
    assert first.embedding == 9 * 64 * -(-chunks[0] // interleave) and last.embedding == 0
    assert first.pipeline == 2 * SBH * chunks[0]
    assert last.pipeline == (0 if interleave == 1 else 2 * SBH * chunks[1])


def test_a_recomputed_layer_ends_with_the_gradients_of_its_four_weights(recipe):
    """Where few tokens make these larger than what the layer keeps."""
    r = gpt(recipe, sparsity=0.75, recompute="full", sequence_length=2, micro_batch=1)
    of_weights, tokens = 2 * 12 * 64**2, 2
    at_end = of_weights + (5 + 3) * 2 * tokens * 64
    assert step_bytes(r, Plan.of(r), 0).workspace == at_end + 2 * 256 * 64


def test_logits_do_not_grow_with_the_micro_batch(recipe):
    """Beyond as many tokens as fit into LOGITS_BYTES: those of GPT-2's vocabulary would take 3 GiB
    here."""
    def head(micro_batch: int) -> int:
        r = recipe(model={"vocab_size": 50257},
                   train={"micro_batch": micro_batch, "global_batch": 1024,
                                                       "sequence_length": 32, "precision": "bf16"})
        return step_bytes(r, Plan.of(r), 0).head

    assert head(1024) < 2 * LOGITS_BYTES
    assert head(64) == pytest.approx(2 * head(32), rel=0.1)  # in one piece


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(("rows", "tokens"),
                         [(50304, 16384), (50304, 2669), (50304, 7), (6288, 16384), (2**28, 5)])
def test_chunks_of_tokens_are_even_and_within_the_bound(rows, tokens, width):
    size = tokens_at_once(rows, tokens, width)
    assert size == 1 or width * rows * size <= LOGITS_BYTES
    chunks = -(-tokens // size)
    assert (chunks - 1) * size < tokens <= chunks * size
    assert tokens - (chunks - 1) * size > size - chunks


def test_dense_gradients_wait_for_the_end_of_backward(recipe):
    """After the first micro-batch; with a single one, or blocks recomputed, they are cut one by
    one."""
    def late(sparsity: float, **changes) -> int:
        r = gpt(recipe, sparsity=sparsity, **changes)
        return step_bytes(r, Plan.of(r), 0).late

    weights = 2 * 12 * 8 * 64**2
    assert late(0.75) - late(0.0) == weights
    assert late(0.75, batch=2) == late(0.0, batch=2)
    assert late(0.75, recompute="full") == late(0.0, recompute="full")


def test_sequence_parallelism_gathers_into_one_buffer(recipe):
    r = gpt(recipe, parallel={"tensor": 4, "sequence": True})
    assert step_bytes(r, Plan.of(r), 0).communication == 2 * SBH


# GiB that PyTorch's CUDA allocator had at most in a step, tests/stand_in_gpu/measure.py; see
# docs/planning.md.
ALLOCATED = [("sparsity=0.0", 47.112), ("sparsity=0.75", 34.329),
             ("sparsity={level: 0.75, dense_copy: per_layer}", 32.077),
             ("sparsity={level: 0.75, pattern: tile, tile: 64}", 32.046),
             ("sparsity=0.0 train.recompute=full", 25.162),
             ("sparsity=0.75 train.recompute=full", 12.377),
             ("sparsity=0.75 engine=deepspeed parallel.zero_stage=2", 34.327),
             ("sparsity=0.0 engine=deepspeed parallel.zero_stage=3", 47.296),
             ("sparsity=0.75 engine=deepspeed parallel.zero_stage=3", 34.513)]


@pytest.mark.parametrize(("settings", "gib"), ALLOCATED)
def test_peak_is_that_of_the_allocator_on_gpt3_xl(settings, gib):
    words = settings.split(" ") if "{" not in settings else [settings]
    r = load_recipe(XL, ["parallel.data=1", "train.global_batch=16", "train.micro_batch=8", *words])
    # Workspaces of libraries, token ids and the like are not counted.
    assert peak_bytes(r, Plan.of(r), 0) / 2**30 == pytest.approx(gib, rel=0.01)


def test_total_counts_the_head_or_the_block_but_not_both(recipe):
    found = step_bytes(r := gpt(recipe), Plan.of(r), 0)
    assert found.total == found.running + max(found.head, found.workspace)
    assert found.total < found.running + found.head + found.workspace


@pytest.mark.parametrize(("head", "workspace", "late", "fullest"), [
    (5, 7, 0, 1_007), (9, 7, 0, 1_009), (9, 7, 1_010, 1_010), (9, 7, 1_008, 1_009)])
def test_sums_of_parts_by_hand(head, workspace, late, fullest):
    found = StepBytes(running=1_000, waiting=20_000, embedding=300_000, pipeline=4_000_000,
                      head=head, workspace=workspace, late=late, communication=50_000_000)
    assert found.activations == 4_321_000
    assert found.total == 54_320_000 + fullest


def test_dense_gradients_of_shared_query_groups_wait_from_the_second_micro_batch_on(recipe):
    """Where more ranks than groups share them, and masks are cut at the end of backward."""
    def workspace(batch: int, groups: int) -> int:
        made = gpt(recipe, batch=batch, groups=groups, heads=8, sparsity=0.5,
                   parallel={"tensor": 4})
        return step_bytes(made, Plan.of(made), 0).workspace

    one, two, three = (workspace(batch, groups=2) for batch in (2, 4, 6))
    assert one < two == three
    assert workspace(2, groups=8) == workspace(4, groups=8)
