"""Bytes that a rank hands to its collectives in a step, by kind and operation, and over which link
they go.

Payloads are counted as `parallel/traffic.py` counts them: a gather and a reduce-scatter of one
tensor alike, by the whole tensor; tests hold the two equal. What a ring then puts on the wire is
`wire_share` of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_spdf.architecture.base import HEAD_NORMS
from megatron_spdf.architecture.sizes import Sizes
from megatron_spdf.planning.activations import sizes_of
from megatron_spdf.planning.buffers import layers_of, weights_by_layer
from megatron_spdf.recipe.recipe import ENGINES, Recipe
from megatron_spdf.sparsity.plan import Plan

Kind = Literal["tensor", "pipeline", "embedding", "gradients", "parameters", "control"]
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "send"]
Link = Literal["inside node", "between nodes"]
Traffic = Counter[tuple[Kind, Operation]]


def step_traffic(recipe: Recipe, plan: Plan, stage: int, on_gpu: bool = True) -> Traffic:
    """Payload bytes of one optimizer step, of each rank of a pipeline stage: (kind, operation) ->
    bytes.

    `tensor` are activations inside the tensor-parallel group; `pipeline` activations and their
    gradients between stages; `embedding` the gradient of the tied embedding between its two copies;
    `gradients` and `parameters` what data parallelism reduces and gathers: compact, so in
    proportion to the active weights; `control` the loss, the stop flag and the gradient norm.
    """
    p, model, size = recipe.parallel, recipe.model, sizes_of(recipe)
    first, last = stage == 0, stage == p.pipeline - 1
    sent: Traffic = _tensor(recipe, stage, size) if p.tensor > 1 else Counter()
    if p.pipeline > 1:
        # every chunk sends forward and back, the ends of the model one way
        sends = 2 * p.interleave - first - last
        sent["pipeline", "send"] += recipe.micro_batches * sends * size.hidden
        if model.tied and (first or last):
            sent["embedding", "all-reduce"] += 4 * model.padded_vocab // p.tensor * model.hidden
    if p.data > 1:
        sent += ENGINES.get(recipe.engine).data_traffic(recipe, plan, stage, on_gpu)
    if p.world > 1:
        norm_group = p.world if p.zero_stage == 1 else p.tensor * p.pipeline
        sent["control", "all-reduce"] += 8 + (4 if norm_group > 1 else 0)
    return sent


def _tensor(recipe: Recipe, stage: int, size: Sizes) -> Traffic:
    """Per micro-batch a layer reduces two outputs forward and two input gradients back (Shoeybi et
    al. 2019, figure 4); under sequence parallelism each becomes a reduce-scatter and a gather, and
    the two gathered inputs are gathered once more for the weight gradients (Korthikanti et al.
    2022, section 4.2.2). Where there are fewer query groups than ranks, queries, keys and values
    are gathered, and their gradients scattered. The LM head makes its gradients as it goes forward.
    Full recomputation repeats forward."""
    p, model = recipe.parallel, recipe.model
    here = [layer for chunk in layers_of(model, p, stage) for layer in chunk]
    layers = sum(0 <= layer < model.layers for layer in here)
    first, last = stage == 0, stage == p.pipeline - 1
    again = 2 * layers if recipe.train.recompute == "full" else 0
    sent: Traffic = Counter()
    per_step = recipe.micro_batches * size.whole
    if p.tensor > model.query_groups:
        fused = recipe.micro_batches * size.width * size.tokens * model.qkv_rows
        sent["tensor", "all-gather"] += fused * (layers + again // 2)
        sent["tensor", "reduce-scatter"] += fused * layers
    whole = [w for layer in here if layer >= 0 for w in weights_by_layer(model)[layer]
             if w.axis is None]
    if p.sequence:
        sent["tensor", "all-gather"] += per_step * (6 * layers + again + first + last)
        sent["tensor", "reduce-scatter"] += per_step * (4 * layers + again + last)
        # The embeddings' output, to which every rank adds the same learned positions, or none.
        learned = model.positions == "learned"
        sent["tensor", "all-reduce" if learned else "reduce-scatter"] += per_step * first
        # Gradients of norms and row-parallel biases, which each rank has for its part of the
        # sequence only.
        sent["tensor", "all-reduce"] += 4 * sum(w.numel for w in whole)
    else:
        # gradients of norms of queries and keys, of which each rank has its own heads
        sent["tensor", "all-reduce"] += 4 * sum(
            w.numel for w in whole if any(name in w.name for name in HEAD_NORMS))
        sent["tensor", "all-reduce"] += per_step * (4 * layers + again + first + last)
    # maximum, target's logit and sum of the softmax over the vocabulary, and the logits' mean, fp32
    if last:
        numbers = 4 if recipe.train.label_smoothing else 3
        sent["tensor", "all-reduce"] += recipe.micro_batches * numbers * 4 * size.tokens
    return sent


@dataclass(frozen=True)
class Route:
    """The group that a kind of traffic goes through.

    Attributes:
        ranks: in the group.
        link: the slowest on its way.
        lanes: ranks of the group in one node, which share the way out and bring a network card
            each.
    """

    ranks: int
    link: Link
    lanes: int


def route(kind: Kind, recipe: Recipe, gpus_per_node: int) -> Route:
    """Ranks are numbered tensor first, then data, then pipeline, and fill one node after the
    other."""
    p = recipe.parallel
    replicas = p.tensor * p.data
    ranks, extent, stride = {
        "tensor": (p.tensor, p.tensor, 1),
        "gradients": (p.data, replicas, p.tensor),
        "parameters": (p.data, replicas, p.tensor),
        "pipeline": (p.pipeline, p.world, replicas),
        "embedding": (2, p.world, p.world - replicas),
        "control": (p.world, p.world, 1),
    }[kind]
    inside = p.world <= gpus_per_node or (extent <= gpus_per_node and gpus_per_node % extent == 0)
    lanes = ranks if inside else max(1, min(ranks, gpus_per_node // stride))
    return Route(ranks, "inside node" if inside else "between nodes", lanes)


def wire_share(operation: Operation, ranks: int) -> float:
    """Bytes that each rank sends in a ring, over the payload (Thakur et al. 2005)."""
    if operation == "send":
        return 1.0
    return (2.0 if operation == "all-reduce" else 1.0) * (ranks - 1) / ranks


def classify(operation: str, group: str) -> tuple[Kind, Operation]:
    """Kind and operation of what `parallel/traffic.py` counted under c10d's and Megatron-Core's
    names."""
    if operation == "send":  # two interleaved stages send through the world's group
        return "pipeline", "send"
    plain: Operation = ("all-gather" if "allgather" in operation else
                        "reduce-scatter" if "reduce_scatter" in operation else "all-reduce")
    if group.startswith("DATA_PARALLEL_GROUP"):
        return "parameters" if plain == "all-gather" else "gradients", plain
    kinds: dict[str, Kind] = {"TENSOR_MODEL_PARALLEL_GROUP": "tensor",
                              "EMBEDDING_GROUP": "embedding"}
    return kinds.get(group, "control"), plain
