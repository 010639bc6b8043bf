"""Saves and restores a run. All ranks call, and a directory appears complete or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.border import load_across_border
from megatron_spdf.checkpoint.run_metadata import (
    INITIAL,
    Masks,
    RunRecord,
    RunState,
    after_moves,
    read_run_record,
    run_record,
    seeded_masks,
    stored_masks,
)
from megatron_spdf.checkpoint.safe_index import INDEX
from megatron_spdf.checkpoint.saving import SaveThread
from megatron_spdf.checkpoint.shared_files import newest_of_all
from megatron_spdf.checkpoint.tensors import TensorFiles
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.engine.base import Engine
from megatron_spdf.files import write_json
from megatron_spdf.layers.compact import compact_of, sparse_modules
from megatron_spdf.recipe.compare import INPUTS, changes_of_run
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan

T = TypeVar("T")


class Checkpointer:
    """Checkpoints of one run, with at most one save under way.

    Args:
        directory: holds the run's checkpoints.
        recipe, plan, tokenizer: recorded in every checkpoint, and checked against a restored one.
        masks, origin: of the weights at step 0; masks None: those that the plan draws.

    Attributes:
        failed_in_a_row: saves that failed since the last that succeeded; after `wait` the same on
            every rank.
        masks, origin: of the run, as its checkpoints record them; see `run_metadata.py`.
    """

    def __init__(self, directory: Path, recipe: Recipe, plan: Plan, tokenizer: Tokenizer,
                 masks: Masks | None = None, origin: str = INITIAL):
        self.directory, self.recipe, self.plan, self.tokenizer = directory, recipe, plan, tokenizer
        self.failed_in_a_row = 0
        self._best: dict[str, str | float] | None = None  # to be written
        self._one_at_a_time = threading.Lock()
        self._saving: SaveThread | None = None
        self._validated = False
        # A slow disk is not a hang: ranks that die meanwhile are found by the collectives of the
        # next step.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self.masks, self.origin = masks or seeded_masks(plan), origin

    def save(self, engine: Engine, state: RunState, measured_sparsity: dict[str, float]) -> None:
        """Starts to write a checkpoint, which becomes visible when it is complete.

        After that, older checkpoints that `checkpoint.keep`, `keep_every` and `keep_at` do not
        cover are removed. The caller has waited for the previous save.

        Args:
            engine: holds weights, masks and optimizer state.
            state: progress of the run.
            measured_sparsity: canonical name of a sparse weight -> fraction of zeros.
        """
        assert self._saving is None
        keep = self.recipe.checkpoint
        masks = after_moves(self.masks, self.recipe.sparsity.algorithm, state.mask_updates)
        run = run_record(self.recipe, self.plan, self.tokenizer, masks, self.origin, asdict(state),
                         measured_sparsity)
        partial = self.directory / (store.name_of(state.step) + store.PARTIAL)

        def add_files(partial: Path) -> None:
            write_json(partial / store.RUN, run)
            self.tokenizer.save(partial / "tokenizer")

        spare = {store.name_of(step) for step in keep.keep_at}
        if keep.best:
            spare.add(store.name_of(state.best_step))
        self._saving = SaveThread(
            partial, engine.state_to_save(), add_files,
            lambda: [*store.retain(self.directory, keep.keep, keep.keep_every, spare),
                     *self._write_best()],
            self._group, not self._validated)
        self._validated = True
        self._saving.start()

    def note_best(self, step: int, loss: float) -> None:
        """Records beside the checkpoints which of them has the lowest validation loss. Where that
        cannot be written, it is tried again after the next save."""
        self._best = {"checkpoint": store.name_of(step), "loss": loss}
        if dist.get_rank() == 0:
            self._write_best()

    def _write_best(self) -> list[str]:
        """Writes the record of the best checkpoint, and returns why that could not be done."""
        with self._one_at_a_time:  # the loop, and the thread of a save
            best = self._best
            try:
                if best:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    write_json(self.directory / store.BEST, best)
            except OSError as error:
                return [f"could not write {store.BEST}: {error}"]
            if self._best is best:
                self._best = None
            return []

    def poll(self) -> SaveThread | None:
        """Returns the save that has ended, if there is one. Ranks may learn of it at different
        steps."""
        return self.wait() if self._saving and not self._saving.is_alive() else None

    def wait(self) -> SaveThread | None:
        """Waits for the save under way and returns it, unless `poll` has returned it before."""
        saving, self._saving = self._saving, None
        if saving:
            saving.join()
            self.failed_in_a_row = self.failed_in_a_row + 1 if saving.error else 0
        return saving

    def restore(self, engine: Engine, boundary: int = 0,
                continues: bool = False) -> tuple[RunState, list[str]]:
        """Loads the newest complete checkpoint, if there is one.

        Args:
            engine: to fill.
            boundary: step at which the previous stage ended, whose last checkpoint is loaded as
                `border.py` says; 0: there is no previous stage.
            continues: whether the optimizer goes on across the boundary.

        Returns:
            Progress of the run, and sentences for the log.

        Raises:
            ValueError: the checkpoint is damaged, holds code, is of another recipe or tokenizer,
                has other masks than the plan draws, or is not seen by all ranks.
        """
        said = []
        if dist.get_rank() == 0:
            said = store.discard_incomplete(self.directory)
        newest = newest_of_all(self.directory)
        if newest is None:
            return RunState(), said
        files = _on_all_ranks(lambda: _open_verified(newest))
        run = read_run_record(newest / store.RUN)
        self._check_run(run, newest)
        state = RunState(**run["state"])
        if boundary and state.step == boundary:
            state.optimizer_steps *= continues
            load_across_border(engine, newest, state.optimizer_steps)
            self.origin = run.get("origin", self.origin)
            if not self.plan.weights:
                return state, [*said, f"densified {newest.name}"]
            self.masks = stored_masks(f"largest magnitudes at step {state.step:,}")
            return state, [*said, f"pruned {newest.name} by magnitude"]
        self.masks, self.origin = run.get("masks", self.masks), run.get("origin", self.origin)
        drawn = [compact_of(m).mask_bits.clone() for model in engine.models
                 for m in sparse_modules(model)]
        wanted = engine.state_to_load()
        _on_all_ranks(lambda: _fill(wanted, files))
        engine.load_state(_tensors_of(wanted), state.optimizer_steps)
        self._check_masks(engine, drawn, newest)
        return state, [*said, f"resumed from {newest.name}"]

    def _check_run(self, run: RunRecord, checkpoint: Path) -> None:
        """Raises a ValueError unless the checkpoint is of this recipe's run, in whatever directory
        it lies. The run's directory has been compared by the content of its data."""
        changes = changes_of_run(Recipe.model_validate(run["recipe"]), self.recipe, longer=True,
                                 same=INPUTS)
        if run["tokenizer"]["sha256"] != self.tokenizer.sha256:
            changes.append(f"tokenizer is {run['tokenizer']['sha256']} there and "
                           f"{self.tokenizer.sha256} here")
        if changes:
            raise ValueError(f"checkpoint {checkpoint} is of another run: {'; '.join(changes)}. "
                             "Use the recipe and the data it was made with, or another output")

    def _check_masks(self, engine: Engine, drawn: list[torch.Tensor], checkpoint: Path) -> None:
        """Raises a ValueError unless seeded masks equal those drawn before. Other masks are
        accepted."""
        modules = [m for model in engine.models for m in sparse_modules(model)]
        for module, bits in zip(modules, drawn, strict=True):
            compact = compact_of(module)
            if self.masks["kind"] == "seeded" and not torch.equal(compact.mask_bits, bits):
                raise ValueError(f"checkpoint {checkpoint} holds another mask of "
                                 f"{compact.planned.name} than the recipe draws "
                                 f"(sparsity.seed={self.plan.seed}); use the recipe it was made "
                                 "with")


def _open_verified(checkpoint: Path) -> TensorFiles:
    """Vets a checkpoint's index, and verifies this rank's share of the files."""
    names = store.files_of(checkpoint)
    store.verify(checkpoint, names=[INDEX, store.RUN])
    files = TensorFiles(checkpoint)
    store.verify(checkpoint, names=names[dist.get_rank()::dist.get_world_size()])
    return files


def _fill(wanted: dict | ShardedTensor, files: TensorFiles) -> None:
    """Reads sharded tensors, in nested dictionaries, from a checkpoint of any layout."""
    if isinstance(wanted, dict):
        for part in wanted.values():
            _fill(part, files)
        return
    there = files.shapes.get(wanted.key, wanted.global_shape)
    if there != tuple(wanted.global_shape):
        raise store.DamagedCheckpoint(f"checkpoint {files.path}: {wanted.key} has shape {there} "
                                      f"instead of {tuple(wanted.global_shape)}; use another "
                                      "checkpoint")
    if files.dtypes.get(wanted.key, wanted.dtype).is_floating_point != (
            wanted.dtype.is_floating_point):
        raise store.DamagedCheckpoint(f"checkpoint {files.path}: {wanted.key} is "
                                      f"{files.dtypes[wanted.key]} instead of {wanted.dtype}; use "
                                      "another checkpoint")
    files.fill(wanted.key, wanted.global_offset, wanted.data.detach())


def _tensors_of(wanted: dict | ShardedTensor) -> dict | torch.Tensor:
    if isinstance(wanted, dict):
        return {key: _tensors_of(part) for key, part in wanted.items()}
    return wanted.data


def _on_all_ranks(action: Callable[[], T]) -> T:
    """Result of an action on this rank. What it finds on one of them is raised on all."""
    fault, result = "", None
    try:
        result = action()
    except (ValueError, OSError) as error:
        fault = str(error)
    faults = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = next((f for f in faults if f), None)
    if found:
        raise store.DamagedCheckpoint(found)
    return result
