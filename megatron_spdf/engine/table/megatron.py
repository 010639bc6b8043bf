"""Megatron-Core: tensor, pipeline and data parallelism, ZeRO-1."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from megatron_spdf.architecture.base import Model
from megatron_spdf.planning.activations import sizes_of
from megatron_spdf.planning.buffers import lay_out
from megatron_spdf.planning.engines import EngineRow
from megatron_spdf.planning.memory import RankBytes, sparse_bytes
from megatron_spdf.planning.moves import gathered_state
from megatron_spdf.planning.traffic import Traffic
from megatron_spdf.recipe.recipe import ENGINES, Parallel, Recipe
from megatron_spdf.sparsity.plan import Plan


class Megatron(EngineRow):
    """Bytes and traffic are those of its buffers, padding included."""

    title = "Megatron-Core"
    engine = "megatron_spdf.engine.megatron:MegatronEngine"
    zero_stages = (0, 1)
    pipeline = True
    dry_run = "megatron_spdf.engine.dry_run"

    def rank_bytes(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool,
                   data_rank: int) -> RankBytes:
        """Shards of ZeRO-1 are even, but padding is no state, and it lies with some ranks."""
        width = 2 if recipe.train.precision == "bf16" else 4
        return _rank_bytes(recipe.model, recipe.parallel, plan, width,
                           recipe.state_bytes, stage, on_gpu, data_rank)

    def data_traffic(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> Traffic:
        elements = sum(b.elements
                       for b in lay_out(recipe.model, recipe.parallel, plan, stage, on_gpu))
        if recipe.parallel.zero_stage == 0:
            return Counter({("gradients", "all-reduce"): 4 * elements})
        return Counter({("gradients", "reduce-scatter"): 4 * elements,
                        ("parameters", "all-gather"): sizes_of(recipe).width * elements})

    def move_bytes(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> int:
        buffers = lay_out(recipe.model, recipe.parallel, plan, stage, on_gpu)
        return gathered_state(recipe, sum(b.elements for b in buffers))


@lru_cache(maxsize=4096)
def _rank_bytes(
    model: Model, parallel: Parallel, plan: Plan, width: int, state: int, stage: int, on_gpu: bool,
    data_rank: int
) -> RankBytes:
    buffers = lay_out(model, parallel, plan, stage, on_gpu)
    elements = sum(b.elements for b in buffers)  # without ZeRO nothing is padded
    owned = (sum(b.shard(data_rank, parallel.data) for b in buffers)
             if parallel.zero_stage == 1 else elements)
    expanded, masks = sparse_bytes(model, parallel, plan, width, stage, on_gpu)
    return RankBytes(
        parameters=width * elements,
        gradients=4 * elements,
        master=4 * owned if width == 2 else 0,
        moments=state * owned,
        expanded=expanded,
        masks=masks,
    )


ENGINES.register("megatron", Megatron())
