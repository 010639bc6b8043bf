"""For how long training stands still for a checkpoint: one that is written behind the steps, and
one that it waits for, dense and sparse, with the bytes on disk; written to a temporary directory
(TMPDIR) and removed."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from benchmarks.engines import build_engine, joined, shared_directory, synthetic_batch
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.tables import MIB, SECONDS, Column, Table, named


def measure_saves(recipes: dict[str, Recipe], saves: int) -> dict[str, dict]:
    """Saves every engine's state after each step, waiting and behind the steps in turn; medians, in
    seconds."""
    with joined(next(iter(recipes.values()))) as device:
        engines = {name: build_engine(recipe, device) for name, recipe in recipes.items()}
        with shared_directory("benchmark_save_") as place:
            return {name: _saves_of(recipes[name], engine, place / name, saves)
                    for name, engine in engines.items()}


def _saves_of(recipe: Recipe, engine, place: Path, saves: int) -> dict:
    from megatron_spdf.checkpoint import store
    from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState

    checkpointer = Checkpointer(place, recipe, engine.plan, NoTokenizer())
    stalls, written = {"waiting": [], "behind": []}, []
    for number in range(1, 2 * saves + 1):
        engine.step(synthetic_batch(recipe, number), number, number * recipe.tokens_per_step, False)
        way = "waiting" if number % 2 else "behind"
        started = time.perf_counter()
        checkpointer.save(engine, RunState(number), engine.measured_sparsity())
        saving = checkpointer.wait() if way == "waiting" else None
        stalls[way].append(time.perf_counter() - started)
        saving = saving or checkpointer.wait()
        if saving.error:
            raise saving.error
        written.append(saving.seconds)
    bytes_on_disk = sum((saving.path / file).stat().st_size for file in store.files_of(saving.path))
    return {"sparsity": engine.plan.sparsity, "bytes_on_disk": bytes_on_disk,
            "write_seconds": statistics.median(written),
            **{f"stall_seconds_{way}": statistics.median(stalls[way]) for way in stalls}}


class NoTokenizer:
    """Stands where a checkpoint keeps the tokenizer; batches are synthetic."""

    kind, sha256 = "none", ""

    def save(self, directory: Path) -> None:
        directory.mkdir()


def render_saves(runs: dict[str, dict]) -> list[str]:
    columns = [Column("", "name"), Column("sparsity", form=".2%"),
               Column("stall, written behind", "stall_seconds_behind", ".4f", SECONDS),
               Column("stall, waited for", "stall_seconds_waiting", ".4f", SECONDS),
               Column("writing", "write_seconds", ".4f", SECONDS),
               Column("disk", "bytes_on_disk", ",.1f", MIB)]
    return [Table(columns, named(runs)).markdown()]
