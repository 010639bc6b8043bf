"""What runs on the ranks of test_moving_bytes.py: buffers, counted and predicted."""

from __future__ import annotations

from cases import bench
from harness import agree_on_port
from megatron.core import parallel_state as ps

from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.engine.base import Engine
from megatron_spdf.engine.factory import make_engine
from megatron_spdf.layers.compact import (
    collect_dense_gradients,
    compact_of,
    drop_dense_gradients,
    sparse_modules,
)
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.moves import moves_of
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.schedule.stages import RunStage, stages_of


def of_parts(recipe: dict) -> list[dict]:
    """Of every part of a run: its sparsity, and bytes after a step."""
    made = Recipe.model_validate(recipe)
    corpus, run, found = check_corpus(made), RunDir(made), []
    agree_on_port()
    device = init_distributed(find_ranks(), made)
    for stage in stages_of(made):
        engine = make_engine(stage.as_single_run, stage.plan, device)
        data = TokenData(stage.recipe, corpus, run.cache, engine.needs_batches)
        engine.step(next(data.training_batches(0)), 1, made.tokens_per_step, False)
        found.append({"sparsity": stage.plan.sparsity, **_counted(engine), **_planned(stage)})
        engine.close()
    destroy()
    return found


def _counted(engine: Engine) -> dict:
    compacts = [compact_of(m) for model in engine.models for m in sparse_modules(model)]
    return {"counted": {**engine.state_bytes(),
                        "masks": sum(b.nbytes for c in compacts for b in c.buffers())}}


def _planned(stage: RunStage) -> dict:
    found = rank_bytes(stage.as_single_run, stage.plan, ps.get_pipeline_model_parallel_rank(),
                       on_gpu=False, data_rank=ps.get_data_parallel_rank())
    return {"planned": {key: getattr(found, key)
                        for key in ("parameters", "gradients", "optimizer", "masks")}}


def of_a_move(recipe: dict) -> dict:
    """Bytes of the dense gradients that are there when masks move, and before the last backward."""
    with bench(recipe) as b:
        compacts = [compact_of(m) for model in b.engine.models for m in sparse_modules(model)]
        alone = b.recipe.sparsity.update.collects == "micro_batch"
        collect_dense_gradients(b.engine.models, b.recipe.micro_batches if alone else 0)

        def held() -> int:
            found = {c.collector.gradient.untyped_storage() for c in compacts
                     if c.collector.gradient is not None}
            return sum(storage.nbytes() for storage in found)

        before = held()
        b.steps(0, 1)
        counted = held()
        drop_dense_gradients(b.engine.models)
        stage = ps.get_pipeline_model_parallel_rank()
        return {"before": before, "counted": counted,
                "planned": moves_of(b.recipe, b.plan, stage, on_gpu=False).transient}
