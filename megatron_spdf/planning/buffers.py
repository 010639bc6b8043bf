"""Where Megatron-Core's DistributedDataParallel puts parameters and gradients, to the element.

One buffer a model chunk, filled in reverse order of the parameters, cut into buckets. With the
distributed optimizer (ZeRO-1) every parameter starts at a multiple of 64 elements, every bucket
ends at a multiple of 128 and of the data-parallel degree, so that it can be cut evenly, and the
tied embedding has a bucket of its own where it is on two pipeline stages. After
`_ParamAndGradBuffer.__init__` of megatron-core 0.16.1, which in 0.19 is
`DistributedOptimizer.compute_full_param_layout`; tests hold it against the real thing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_spdf.architecture.base import EMBEDDING, HEAD, Model, Weight
from megatron_spdf.recipe.recipe import Parallel
from megatron_spdf.sparsity.plan import Plan

PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128  # elements
SMALLEST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000  # elements, Megatron-Core's defaults


@dataclass(frozen=True)
class Local:
    """A parameter as one rank holds it.

    Attributes:
        name, layer: of its weight.
        elements: of the parameter.
        expands_to: elements of the dense weight that a compact parameter stands for; 0 for others.
    """

    name: str
    layer: int
    elements: int
    expands_to: int


@dataclass(frozen=True)
class Buffer:
    """One chunk's buffer, in elements: [start, end) of every bucket and of every parameter, in the
    buffer's order."""

    buckets: tuple[tuple[int, int], ...]
    parameters: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Elements with padding."""
        return self.buckets[-1][1]

    def shard(self, data_rank: int, data: int) -> int:
        """Elements of parameters in the even share of every bucket that a data-parallel rank
        updates."""
        owned, buckets = 0, iter(self.buckets)
        first, last = next(buckets)
        for start, end in self.parameters:
            while start >= last:
                first, last = next(buckets)
            # buckets are padded to a multiple of `data`, so that every rank updates as much of each
            share = (last - first) // data
            low = first + data_rank * share
            owned += max(0, min(end, low + share) - max(start, low))
        return owned


@lru_cache(maxsize=64)
def weights_by_layer(model: Model) -> dict[int, tuple[Weight, ...]]:
    """`Model.weights` by layer, once for each model: a search over layouts asks thousands of
    times."""
    layers: dict[int, list[Weight]] = {}
    for weight in model.weights():
        layers.setdefault(weight.layer, []).append(weight)
    return {layer: tuple(weights) for layer, weights in layers.items()}


def layers_of(model: Model, parallel: Parallel, stage: int) -> list[list[int]]:
    """Layers on a pipeline rank, chunk by chunk; -1 is what comes before the layers, `layers` what
    comes after."""
    size = model.layers // (parallel.pipeline * parallel.interleave)
    chunks = []
    for chunk in range(parallel.interleave):
        first = (chunk * parallel.pipeline + stage) * size
        chunks.append(list(range(first, first + size)))
    if stage == 0:
        chunks[0].insert(0, -1)
    if stage == parallel.pipeline - 1:
        chunks[-1].append(model.layers)
    return chunks


def local_parameters(model: Model, parallel: Parallel, plan: Plan,
                     stage: int) -> tuple[tuple[Local, ...], ...]:
    """This rank's parameters, chunk by chunk, in the order in which Megatron-Core's modules name
    them.

    With more than one stage, the last holds a tied embedding a second time.
    """
    chunks = tuple(tuple(layers) for layers in layers_of(model, parallel, stage))
    # the LM head is on the last stage and the embedding on the first
    tied_twice = model.tied and parallel.pipeline > 1
    return _local_parameters(model, parallel.tensor, tied_twice, plan, chunks)


@lru_cache(maxsize=4096)
def _local_parameters(
    model: Model, tensor: int, tied_twice: bool, plan: Plan, chunks: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Local, ...], ...]:
    weights = weights_by_layer(model)
    local = [[_local(w, plan, tensor) for layer in layers
              for w in _in_order(weights[layer], model.ORDER, plan)] for layers in chunks]
    if tied_twice and model.layers in chunks[-1]:
        embedding = _local(next(w for w in weights[-1] if w.name == EMBEDDING), plan, tensor)
        local[-1].append(Local(HEAD, model.layers, embedding.elements, 0))
    return tuple(map(tuple, local))


def _local(weight: Weight, plan: Plan, tensor: int) -> Local:
    sparse, shards = plan.weights.get(weight.name), 1 if weight.axis is None else tensor
    stored = sparse.slices * sparse.stored_per_slice if sparse else weight.numel
    return Local(weight.name, weight.layer, stored // shards,
                 weight.numel // shards if sparse else 0)


def _in_order(weights: Sequence[Weight], modules: Sequence[str], plan: Plan) -> list[Weight]:
    """One layer's weights by module; compact values are a submodule's parameter, named after the
    module's own."""
    def order(weight: Weight) -> tuple[int, bool]:
        parts = weight.name.split(".")
        module = next((i for i, name in enumerate(modules) if name in parts), 0)
        base = weight.name.rpartition(".")[0]
        return module, weight.name.endswith(".weight" if f"{base}.weight" in plan.weights
                                            else ".bias")

    return sorted(weights, key=order)


@lru_cache(maxsize=4096)
def lay_out(model: Model, parallel: Parallel, plan: Plan, stage: int,
            on_gpu: bool) -> tuple[Buffer, ...]:
    """The buffers of a pipeline stage's chunks.

    Args:
        on_gpu: only there are gradients reduced behind compute, and only then cut into several
            buckets; and only those of the first stage's first chunk, since the others' traffic is
            not critical.
    """
    p = parallel
    overlaps = on_gpu and p.overlap and p.data > 1
    limit = max(SMALLEST_BUCKET, BUCKET_PER_RANK * p.data)
    buffers = []
    for number, chunk in enumerate(local_parameters(model, p, plan, stage)):
        bucketed = overlaps and stage == 0 and number == 0
        buffers.append(_fill(chunk, p.data if p.zero_stage == 1 else 0,
                             model.tied and p.pipeline > 1, limit if bucketed else None))
    return tuple(buffers)


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

    # Gradients become ready from the last layer to the first: buckets fill in that order.
    for parameter in reversed(chunk):
        start = _round_up(end, PARAMETER_ALIGNMENT) if shards else end
        alone = bool(shards) and tied_twice and parameter.name in (EMBEDDING, HEAD)
        # both copies of a tied embedding lie alike in buckets, to be summed over stages
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
