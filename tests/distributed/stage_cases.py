"""What runs on the ranks of the tests of stages; functions as in cases.py."""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from cases import logits, on_first
from harness import agree_on_port

from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.engine import factory
from megatron_spdf.engine.base import Engine
from megatron_spdf.engine.factory import make_engine
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.training.job import Job, train

TIMING = {"tokens_per_second", "model_tflops_per_rank", "step_seconds", "data_seconds",
          "memory_bytes"}


def staged(recipes: list[dict], stops: list[int | None]) -> dict:
    """A run as pretrain.py does it, started with each recipe (layout) in turn and stopped with a
    step.

    Returns:
        Exit codes, how many engines each start made, and the records of the log.
    """
    codes, engines = [], []
    for values, stop in zip(recipes, stops, strict=True):
        recipe = Recipe.model_validate(values)
        run, corpus = RunDir(recipe), check_corpus(recipe)
        agree_on_port()
        device = init_distributed(find_ranks(), recipe)
        job = Job(find_ranks(), run, stages_of(recipe), "", corpus.tokenizer,
                  partial(_token_data, corpus, run.cache))
        with patch.object(factory, "make_engine", side_effect=partial(_stopping, stop)) as made:
            codes.append(train(job, SimpleNamespace(requested=False), device))
        engines.append(made.call_count)
    records = [json.loads(line) for line in run.log.read_text().splitlines()]
    return {"codes": codes, "engines": engines,
            "records": [{k: v for k, v in r.items() if k not in TIMING} for r in records
                                        if r["kind"] in ("train", "valid")]}


def _stopping(stop: int | None, *arguments) -> Engine:
    """An engine to which a request to stop comes with a step."""
    engine = make_engine(*arguments)
    step = engine.step
    engine.step = lambda batch, number, tokens, stop_requested: step(
        batch, number, tokens, number == stop)
    return engine


def samples_of_stages(recipe: dict) -> list[int]:
    """Numbers of the samples that this rank reads in a run."""
    drawn, found = TokenData._indices, []

    def noted(data: TokenData, step: int, micro: int) -> list[int]:
        found.append(drawn(data, step, micro))
        return found[-1]

    TokenData._indices = noted
    try:
        staged([recipe], [None])
    finally:
        TokenData._indices = drawn
    return [number for numbers in found for number in numbers]


def across(recipe: dict, ids: torch.Tensor) -> dict:
    """The border of a run with two stages, seen from both sides.

    Returns:
        Logits on the ranks that have them; bytes of the first engine alive when the second is
        there; zeros of the linear weights and sums of moments then; the losses of the second stage,
        and those of a plain dense run with its schedule from the checkpoint that was densified on
        disk, on the same batches.
    """
    made = Recipe.model_validate(recipe)
    sparse, dense = stages_of(made)
    corpus, run = check_corpus(made), RunDir(made)
    agree_on_port()
    device = init_distributed(find_ranks(), made)
    engine, data, checkpointer = _opened(sparse.as_single_run, sparse.recipe, sparse.plan, run,
                                         corpus, device)
    checkpointer.origin = "given weights"
    for number, batch in zip(range(1, sparse.last + 1), data.training_batches(0), strict=False):
        engine.step(batch, number, number * made.tokens_per_step, False)
    before = logits(engine, ids) if hasattr(engine, "chunks") else None
    checkpointer.save(engine, RunState(sparse.last, sparse.last), engine.measured_sparsity())
    assert checkpointer.wait().error is None
    alive = [weakref.ref(p) for model in engine.models for p in model.parameters()]
    alive += [weakref.ref(b.grad_data) for chunk in getattr(engine, "chunks", [])
              for b in chunk.buffers]
    engine.close()

    engine, data, checkpointer = _opened(dense.as_single_run, dense.recipe, dense.plan, run, corpus,
                                         device)
    state, said = checkpointer.restore(engine, boundary=dense.first)
    adam = engine.torch_optimizer
    found = {
        "before": before, "after": logits(engine, ids) if hasattr(engine, "chunks") else None,
        "state": state, "origin": checkpointer.origin,
        "said": said, "alive": sum(ref().untyped_storage().nbytes() for ref in alive
                                   if ref() is not None),
        "moments": sum(float(t.abs().sum()) for s in adam.state.values() for k,
                       t in s.items() if k != "step"),
        "zeros": [float((p == 0).float().mean()) for model in engine.models for n,
                  p in model.named_parameters()
                  if "linear" in n and n.endswith("weight") and p.ndim == 2],
        "stage": _losses(engine, data, dense)}
    engine.close()

    plain = dense.as_single_run.model_copy(update={"output": f"{made.output} plain"})
    on_first(lambda: write_initial_checkpoint(CheckpointReader(find_checkpoint(run.root)), plain,
                                              corpus.tokenizer,
                               Path(plain.output)))
    engine, _, checkpointer = _opened(plain, plain, dense.plan, RunDir(plain), corpus, device)
    assert checkpointer.restore(engine)[0].step == 0
    found["plain"] = _losses(engine, data, dense)
    engine.close()
    destroy()
    return found


def _opened(alone: Recipe, recorded: Recipe, plan, run: RunDir, corpus, device):
    engine = make_engine(alone, plan, device)
    return (engine, _token_data(corpus, run.cache, recorded, engine),
            Checkpointer(run.checkpoints, recorded, plan, corpus.tokenizer))


def _token_data(corpus, cache: Path, recipe: Recipe, engine) -> TokenData:
    return TokenData(recipe, corpus, cache, engine.needs_batches)


def _losses(engine, data: TokenData, stage) -> list[tuple[float, float]]:
    """Losses and gradient norms of all steps of a stage."""
    results = [engine.step(batch, number, (number - stage.first) * stage.recipe.tokens_per_step,
                           False)
               for number, batch in zip(range(stage.first + 1, stage.last + 1),
                                        data.training_batches(stage.first), strict=False)]
    return [(result.loss, result.grad_norm) for result in results]
