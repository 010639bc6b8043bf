"""One rank of a layout of any size, built on the meta device with PyTorch's fake process group: no
hardware, no other ranks, no memory. What it counts are the parameters, buffers, buckets and
optimizer shards of the engine itself.

    echo '[{"recipe": {...}, "ranks": [0, 1023]}, ...]' | python -m megatron_spdf.engine.dry_run

A process of its own: the stand-in for CUDA and Megatron-Core's process groups are global.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_spdf.parallel import fake_cuda
from megatron_spdf.parallel.ranks import destroy, set_up_groups
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan

META = torch.device("meta")


def count(recipe: Recipe, rank: int) -> dict:
    """What the engine of one rank holds.

    Returns:
        Bytes of parameters, gradients, optimizer, expanded and masks; `buckets`, the elements of
        every gradient bucket, chunk by chunk; `place`, the rank's (tensor, pipeline, data) ranks.
    """
    from megatron.core import parallel_state as ps

    from megatron_spdf.engine.megatron import MegatronEngine
    from megatron_spdf.layers.compact import compact_of, sparse_modules

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=recipe.parallel.world)
    set_up_groups(recipe)
    plan = Plan.of(recipe)
    with META:
        engine = MegatronEngine(recipe, plan, META)
        # Not module.weight: hooks on it would start a gather of parameters.
        expanded = sum(compact_of(m).forward(m.parametrizations.weight.original).nbytes
                       for model in engine.models for m in sparse_modules(model)
                       if compact_of(m).product is None)
    found = {
        **engine.state_bytes(),
        "expanded": expanded,
        "masks": sum(b.nbytes for model in engine.models for b in model.buffers()),
        "buckets": [[b.grad_data.numel() for b in buffer.buckets] for c in engine.chunks
                    for buffer in c.buffers],
        "place": [ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank(),
                  ps.get_data_parallel_rank()],
    }
    destroy()
    return found


def main() -> None:
    requests = json.load(sys.stdin)
    fake_cuda.install(META)  # before megatron.core is imported
    recipes = [Recipe.model_validate(request["recipe"]) for request in requests]
    json.dump([[count(recipe, rank) for rank in request["ranks"]]
               for recipe, request in zip(recipes, requests, strict=True)], sys.stdout)


if __name__ == "__main__":
    main()
