"""What moves of the masks add to a run: steps after which masks move beside steps after which they
do not, in one process and in turn, with all that such a step does beside: collecting the dense
gradient, choosing, carrying weights and optimizer state. Where weights keep all entries, it is the
step itself that chooses. Where an algorithm has dense and sparse parts instead, it is the borders
between them: a checkpoint is written and read, and the engine built anew."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.engines import build_engine, joined, shared_directory, synthetic_batch
from benchmarks.kernel_throughput import median_seconds
from benchmarks.save import NoTokenizer
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.stages import RunStage, stages_of
from megatron_spdf.sparsity import largest
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.tables import SECONDS, Column, Table, named

ALGORITHMS = ("set", "rigl", "gmp")
WARM_UP = 2  # pairs of steps
LENGTH = 100  # of the run that is measured, in intervals between moves


@dataclass
class Moved:
    """Stands where a run reports its moves, and keeps their seconds."""

    seconds: list[float] = field(default_factory=list)

    def moved(self, entries: int, seconds: float | None = None) -> None:
        if seconds is not None:
            self.seconds.append(seconds)


def measure_moves(recipes: dict[str, Recipe], moves: int) -> dict[str, dict]:
    """Figures of every recipe's algorithm; `moves` are measured of each."""
    with joined(next(iter(recipes.values()))) as device:
        return {name: measure_one(recipe, device, moves) for name, recipe in recipes.items()}


def measure_one(recipe: Recipe, device: torch.device, moves: int, quick: bool = False) -> dict:
    """Figures of a recipe's algorithm.

    Args:
        moves: that are measured, if the run has as many.
        quick: as `build_engine` takes it.
    """
    if any(next(_due_steps(stage), None) for stage in stages_of(recipe)):
        return _measure(_long(recipe), device, moves, quick)
    return _measure_borders(recipe, device, moves)


def _long(recipe: Recipe) -> Recipe:
    """The recipe with enough steps for many moves."""
    steps = max(recipe.steps, LENGTH * recipe.sparsity.update.every)
    train = recipe.train.model_copy(update={"tokens": steps * recipe.tokens_per_step})
    return recipe.model_copy(update={"train": train})


def _measure(recipe: Recipe, device: torch.device, moves: int, quick: bool) -> dict:
    from megatron_spdf.checkpoint.run_metadata import RunState
    from megatron_spdf.layers.masked import choose_masks
    from megatron_spdf.training.mask_moves import MaskMoves

    stage, algorithm = _fullest(stages_of(recipe)), recipe.sparsity.update
    engine, report = build_engine(stage.recipe, device, quick), Moved()
    masks = MaskMoves(stage, engine, RunState(), report)
    plain, due = [], []
    gc.disable()
    for number, step in enumerate(islice(cycle(_due_steps(stage)), WARM_UP + moves), 1):
        for seconds, at in ((plain, max(1, step - 1)), (due, step)):
            if algorithm.keeps:
                choose_masks(engine.models, due=seconds is due)
            seconds.append(_seconds(masks, at, synthetic_batch(recipe, number)))
    gc.enable()
    figures = {"sparsity": engine.plan.sparsity, "every": algorithm.every,
               **_figures(plain[WARM_UP:], due[WARM_UP:], report.seconds[WARM_UP:],
                          algorithm.every)}
    engine.close()
    return figures


def _measure_borders(recipe: Recipe, device: torch.device, borders: int) -> dict:
    """Measures an algorithm whose parts differ in what they store, as a run crosses from one to the
    next."""
    stages = stages_of(recipe)
    plain, crossings, parts = [], [], defaultdict(list)
    with shared_directory("benchmark_moves_") as place:
        engine = build_engine(stages[0].as_single_run, device)
        for here, there in islice(pairwise(stages), borders):
            plain += _plain_seconds(engine, here)
            started = time.perf_counter()
            engine = _crossed(engine, here, there, place, device, parts)
            crossings.append(time.perf_counter() - started)
        engine.close()
    every = recipe.steps // (len(stages) - 1)
    low, middle, high = statistics.quantiles(crossings, n=4)
    step = statistics.median(plain)
    return {"sparsity": stages[-1].plan.sparsity, "every": every, "step_seconds": step,
            "longer_seconds": middle, "longer_quartiles": [low, high], "move_seconds": middle,
            "share": middle / (every * step),
            "border_seconds": {what: statistics.median(spent) for what, spent in parts.items()}}


def _plain_seconds(engine, stage: RunStage) -> list[float]:
    """Seconds of steps after the first, which gives the optimizer its state."""
    seconds = []
    for number in range(1, 2 + WARM_UP):
        batch = synthetic_batch(engine.recipe, number)
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.step(batch, stage.first + number, number * engine.recipe.tokens_per_step, False)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _crossed(engine, here: RunStage, there: RunStage, place: Path, device: torch.device,
             parts: dict[str, list[float]]):
    """The engine of the next part, filled from the last checkpoint of this one; `parts` gets the
    seconds of copying the state to the host, of writing it, of building the engine and of filling
    it."""
    from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState

    times = [time.perf_counter()]
    saved = Checkpointer(place, here.recipe, here.plan, NoTokenizer())
    saved.save(engine, RunState(here.last, here.last), engine.measured_sparsity())
    times.append(time.perf_counter())
    if error := saved.wait().error:
        raise error
    engine.close()
    times.append(time.perf_counter())
    following = build_engine(there.as_single_run, device)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    Checkpointer(place, there.recipe, there.plan, NoTokenizer()).restore(
        following, there.first, there.continues)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    for what, (began, ended) in zip(("copied", "written", "built", "filled"), pairwise(times),
                                    strict=True):
        parts[what].append(ended - began)
    return following


def _fullest(stages: list[RunStage]) -> RunStage:
    """The part of a run with moves that stores most."""
    return max((s for s in stages if s.plan.weights and next(_due_steps(s), None)),
               key=lambda stage: stage.plan.active)


def _due_steps(stage: RunStage) -> Iterator[int]:
    algorithm = stage.recipe.sparsity.update
    return (step for step in range(stage.first - stage.begin + 1, stage.last - stage.begin + 1)
            if algorithm.due(step, stage.steps))


def _seconds(masks, at: int, batch: list[dict]) -> float:
    """Seconds of an optimizer step, the `at`th of its stage, as the training loop takes it."""
    engine = masks.engine
    engine.optimizer_steps = at - 1
    torch.cuda.synchronize()
    started = time.perf_counter()
    masks.before_step()
    result = engine.step(batch, at, at * engine.recipe.tokens_per_step, False)
    masks.state.optimizer_steps = engine.optimizer_steps
    masks.after_step(result)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _figures(plain: list[float], due: list[float], moves: list[float], every: int) -> dict:
    """Medians; the share is that of what a step with a move takes longer than the one before."""
    step = statistics.median(plain)
    longer = [b - a for a, b in zip(plain, due, strict=True)]
    low, middle, high = statistics.quantiles(longer, n=4)
    return {"step_seconds": step, "longer_seconds": middle, "longer_quartiles": [low, high],
            "move_seconds": statistics.median(moves) if moves else middle,
            "share": middle / (every * step)}


def render_moves(runs: dict[str, dict]) -> list[str]:
    columns = [Column("", "name"), Column("sparsity", form=".2%"),
               Column("step, median", "step_seconds", ".4f", SECONDS),
               Column("longer with a move", "longer_seconds", ".4f", SECONDS),
               Column("quartiles",
                      lambda f: " - ".join(f"{s:.4f}" for s in f["longer_quartiles"])),
               Column("the move alone", "move_seconds", ".4f", SECONDS),
               Column("every", form="d"), Column("of a run", "share", ".2%")]
    return [Table(columns, named(runs)).markdown()]


def time_choices(weight: SparseWeight, device: torch.device, dtype: torch.dtype,
                 seconds: float) -> Iterator[dict]:
    """Seconds of filling the masks of a weight with its largest magnitudes, the active entries
    alone and with twice as many beside them, by every candidate of the kernels and by PyTorch.

    Args:
        seconds: that each measurement takes at least.
    """
    from megatron_spdf.kernels import selection

    values = torch.randn(weight.slices, weight.numel // weight.slices, device=device).to(dtype)
    k = weight.active_per_slice
    active, both = ([(n, torch.zeros(len(values), -(-values.shape[1] // 8), dtype=torch.uint8,
                                     device=device)) for n in numbers]
                    for numbers in ((k,), (k, 2 * k)))
    kernels = selection.largest_kernels(values)
    shapes = kernels.SELECTION if kernels else {}
    for shape in (*shapes.get(dtype.itemsize, ()), None):
        by = (patch.object(largest, "largest_kernels", lambda values: None) if shape is None else
              patch.dict(shapes, {dtype.itemsize: (shape,)}))
        with by:
            one, two = (median_seconds(lambda wanted=wanted: largest.fill_largest(values, wanted),
                                       seconds) for wanted in (active, both))
        yield {"by": "torch" if shape is None else ", ".join(
            f"{value} {name}" for name, value in zip(shape._fields, shape, strict=True)),
            "active": one, "with twice as many": two, "bytes": values.nbytes}
