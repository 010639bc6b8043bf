"""Saves and restores a run: all ranks call, the directory appears complete or not at all."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import _get_write_results_queue

from megatron_spdf import __version__
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.vet import vet_metadata
from megatron_spdf.config import Recipe
from megatron_spdf.data.tokenizer import Tokenizer
from megatron_spdf.engine import Engine
from megatron_spdf.parallel import signals
from megatron_spdf.sparsity.compact import compact_of, sparse_modules
from megatron_spdf.sparsity.plan import Plan


@dataclass
class RunState:
    """Where a run stands. With the recipe it determines learning rate, data position and random numbers.

    Attributes:
        step: batches consumed, skipped ones included.
        optimizer_steps: updates done.
        skipped: steps skipped for non-finite numbers, in all and in a row.
        evaluated: step of the last evaluation.
        best_step, best_loss: of the evaluation with the lowest loss; step 0: none yet.
        worse: evaluations since.
        tokens: that the model has read.
    """

    step: int = 0
    optimizer_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = 0
    best_step: int = 0
    best_loss: float | None = None
    worse: int = 0
    tokens: int = 0


class Checkpointer:
    """Checkpoints of one run.

    Args:
        directory: holds the run's checkpoints.
        recipe, plan, tokenizer: kept with every checkpoint, and what a restored one must agree with.
    """

    def __init__(self, directory: Path, recipe: Recipe, plan: Plan, tokenizer: Tokenizer):
        self.directory, self.recipe, self.plan, self.tokenizer = directory, recipe, plan, tokenizer

    def save(self, engine: Engine, state: RunState, measured_sparsity: dict[str, float]) -> Path:
        """Writes a checkpoint, makes it visible, and removes those past `checkpoint.keep`."""
        partial = self.directory / (store.name_of(state.step) + store.PARTIAL)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with signals.blocked():  # the server of this queue, which the writer keeps, is started on first use
            _get_write_results_queue()
        dist_checkpointing.save(engine.sharded_state(loading=False), str(partial))
        if dist.get_rank() == 0:
            self._write_run(partial, state, measured_sparsity)
            self.tokenizer.save(partial / "tokenizer")
        dist.barrier()
        files = _describe_shared(partial)
        if dist.get_rank() == 0:
            store.publish(partial, files)
            best = store.name_of(state.best_step) if self.recipe.checkpoint.best else None
            store.retain(self.directory, self.recipe.checkpoint.keep, best)
        dist.barrier()
        return self.directory / store.name_of(state.step)

    def restore(self, engine: Engine) -> tuple[RunState, list[str]]:
        """Loads the newest complete checkpoint, if there is one.

        Returns:
            Where the run stands, and what was found and done, as sentences for the log.

        Raises:
            ValueError: the checkpoint is damaged, holds code, or other masks than the plan draws.
        """
        said = []
        if dist.get_rank() == 0:
            said = [f"discarded {name}, a save that did not finish"
                    for name in store.discard_incomplete(self.directory)]
        dist.barrier()
        found = store.complete(self.directory)
        if not found:
            return RunState(), said
        newest = found[-1]
        _verify_shared(newest)
        vet_metadata(newest)
        run = json.loads((newest / store.RUN).read_text())
        state = RunState(**run["state"])
        drawn = [compact_of(m).mask_bits.clone() for model in engine.models for m in sparse_modules(model)]
        loaded = dist_checkpointing.load(engine.sharded_state(loading=True), str(newest))
        engine.load_state(loaded, state.optimizer_steps)
        self._check_masks(engine, drawn, newest)
        return state, [*said, f"resumed from {newest.name}"]

    def _write_run(self, partial: Path, state: RunState, measured_sparsity: dict[str, float]) -> None:
        recipe = self.recipe
        store.write_json(partial / store.RUN, {
            "state": asdict(state),
            "tokens": state.tokens,
            "recipe": recipe.model_dump(),
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256},
            "sparsity": {n: {"target": w.sparsity, "measured": measured_sparsity[n]}
                         for n, w in self.plan.weights.items()},
            "versions": {"megatron_spdf": __version__, "torch": torch.__version__,
                         "megatron-core": version("megatron-core")},
            "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        })

    def _check_masks(self, engine: Engine, drawn: list[torch.Tensor], checkpoint: Path) -> None:
        modules = [m for model in engine.models for m in sparse_modules(model)]
        for module, bits in zip(modules, drawn, strict=True):
            compact = compact_of(module)
            if not torch.equal(compact.mask_bits, bits):
                raise ValueError(f"checkpoint {checkpoint} holds another mask of {compact.planned.name} than the "
                                 f"recipe draws (sparsity.seed={self.plan.seed}); use the recipe it was made with")


def _describe_shared(directory: Path) -> dict[str, dict[str, object]]:
    """Sizes and checksums of all files, every rank reading its share."""
    names = store.files_of(directory)
    mine = {n: store.describe(directory / n) for n in names[dist.get_rank()::dist.get_world_size()]}
    shares: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return {name: entry for share in shares for name, entry in sorted(share.items())}


def _verify_shared(checkpoint: Path) -> None:
    """`store.verify` with the reading shared among ranks; every rank raises what any one found."""
    names = store.files_of(checkpoint)
    fault = ""
    try:
        store.verify(checkpoint, names=names[dist.get_rank()::dist.get_world_size()])
    except store.DamagedCheckpoint as error:
        fault = str(error)
    faults = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = next((f for f in faults if f), None)
    if found:
        raise store.DamagedCheckpoint(found)
