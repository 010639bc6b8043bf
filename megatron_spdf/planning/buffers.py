"""Where Megatron-Core's DistributedDataParallel puts parameters and gradients, to the element.

One buffer a model chunk, filled in reverse order of the parameters, cut into buckets. With the distributed optimizer
(ZeRO-1) every parameter starts at a multiple of 64 elements, every bucket ends at a multiple of 128 and of the
data-parallel degree, so that it can be cut evenly, and the tied embedding has a bucket of its own where it is on two
pipeline stages. After `_ParamAndGradBuffer.__init__` of megatron-core 0.16.1; tests hold it against the real thing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_spdf.config.recipe import Model, Recipe
from megatron_spdf.model.weights import EMBEDDING, TIED_OUTPUT, Weight, model_weights
from megatron_spdf.sparsity.plan import Plan

PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128  # elements
SMALLEST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000  # elements, Megatron-Core's defaults
ORDER = ("input_layernorm", "linear_proj", "linear_qkv", "pre_mlp_layernorm", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Local:
    """A parameter as one rank holds it: its weight's name and layer, its elements, and whether they are compact."""

    name: str
    layer: int
    elements: int
    compact: bool


@dataclass(frozen=True)
class Buffer:
    """One chunk's buffer, in elements: [start, end) of every bucket and of every parameter, in the buffer's order."""

    buckets: tuple[tuple[int, int], ...]
    parameters: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """With padding."""
        return self.buckets[-1][1]

    def shard(self, data_rank: int, data: int) -> int:
        """Elements of parameters in the even share of every bucket that a data-parallel rank updates."""
        owned = 0
        for start, end in self.buckets:
            share = (end - start) // data
            low, high = start + data_rank * share, start + (data_rank + 1) * share
            owned += sum(max(0, min(e, high) - max(s, low)) for s, e in self.parameters)
        return owned


@lru_cache(maxsize=64)
def weights_by_layer(model: Model) -> dict[int, tuple[Weight, ...]]:
    """`model_weights` by layer, once for each model: a search over layouts asks thousands of times."""
    layers: dict[int, list[Weight]] = {}
    for weight in model_weights(model):
        layers.setdefault(weight.layer, []).append(weight)
    return {layer: tuple(weights) for layer, weights in layers.items()}


def layers_of(recipe: Recipe, stage: int) -> list[list[int]]:
    """Layers on a pipeline rank, chunk by chunk; -1 is what comes before the blocks, `layers` what comes after."""
    p = recipe.parallel
    size = recipe.model.layers // (p.pipeline * p.interleave)
    chunks = []
    for chunk in range(p.interleave):
        first = (chunk * p.pipeline + stage) * size
        chunks.append(list(range(first, first + size)))
    if stage == 0:
        chunks[0].insert(0, -1)
    if stage == p.pipeline - 1:
        chunks[-1].append(recipe.model.layers)
    return chunks


def local_parameters(recipe: Recipe, plan: Plan, stage: int) -> list[list[Local]]:
    """This rank's parameters, chunk by chunk, in the order in which Megatron-Core's modules name them.

    With more than one stage, the last holds the tied embedding a second time.
    """
    p, weights = recipe.parallel, weights_by_layer(recipe.model)
    chunks = [[_local(w, plan, p.tensor) for layer in layers for w in _in_order(weights[layer], plan)]
              for layers in layers_of(recipe, stage)]
    if p.pipeline > 1 and stage == p.pipeline - 1:
        embedding = next(w for w in weights[-1] if w.name == EMBEDDING)
        chunks[-1].append(Local(TIED_OUTPUT, recipe.model.layers, _local(embedding, plan, p.tensor).elements, False))
    return chunks


def _local(weight: Weight, plan: Plan, tensor: int) -> Local:
    sparse = plan.weights.get(weight.name)
    elements = (sparse.active if sparse else weight.numel) // (1 if weight.axis is None else tensor)
    return Local(weight.name, weight.layer, elements, sparse is not None)


def _in_order(weights: Sequence[Weight], plan: Plan) -> list[Weight]:
    """One layer's weights by module; compact values are a submodule's parameter, named after the module's own."""
    def order(weight: Weight) -> tuple[int, bool]:
        module = next((i for i, name in enumerate(ORDER) if f".{name}." in weight.name), 0)
        base = weight.name.rpartition(".")[0]
        return module, weight.name.endswith(".weight" if f"{base}.weight" in plan.weights else ".bias")

    return sorted(weights, key=order)


def lay_out(recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> list[Buffer]:
    """The buffers of a pipeline stage's chunks.

    Args:
        on_gpu: only there are gradients reduced behind compute, and only then cut into several buckets; and only
            those of the first stage's first chunk, since the others' traffic is not critical.
    """
    p = recipe.parallel
    overlaps = on_gpu and p.overlap and p.data > 1
    limit = max(SMALLEST_BUCKET, BUCKET_PER_RANK * p.data)
    buffers = []
    for number, chunk in enumerate(local_parameters(recipe, plan, stage)):
        bucketed = overlaps and stage == 0 and number == 0
        buffers.append(_fill(chunk, p.data if p.zero_stage == 1 else 0, p.pipeline > 1, limit if bucketed else None))
    return buffers


def _fill(chunk: Sequence[Local], shards: int, tied_twice: bool, limit: int | None) -> Buffer:
    """Args:
        shards: ranks that share the optimizer's work; 0 without ZeRO, where nothing is padded.
        limit: elements after which a bucket ends; None for no limit.
    """
    alignment = math.lcm(shards, BUCKET_ALIGNMENT) if shards else 1
    buckets: list[tuple[int, int]] = []
    parameters: list[tuple[int, int]] = []
    start = end = opened = 0

    def close(at: int) -> int:
        nonlocal opened
        buckets.append((opened, _round_up(at, alignment)))
        opened = buckets[-1][1]
        return opened

    for parameter in reversed(chunk):
        start = _round_up(end, PARAMETER_ALIGNMENT) if shards else end
        alone = bool(shards) and tied_twice and parameter.name in (EMBEDDING, TIED_OUTPUT)
        if alone and parameters and parameters[-1][1] > opened:
            start = close(start)
        end = start + parameter.elements
        parameters.append((start, end))
        if alone or (limit is not None and end - opened >= limit):
            end = close(end)
    if not buckets or end > opened:
        close(end)
    return Buffer(tuple(buckets), tuple(parameters))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
