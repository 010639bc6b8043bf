"""Choice of the micro-batch for `train.micro_batch: auto`.

Whole steps on random tokens are timed from one sequence up, and the fastest of those that fit in
memory is taken. The run directory records it, so that every start at one layout takes the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist

from megatron_spdf.engine.base import Engine
from megatron_spdf.engine.factory import make_engine
from megatron_spdf.files import write_json
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.planning.search import LARGEST_MICRO_BATCH, USABLE
from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.resilience.progress import PROGRESS
from megatron_spdf.runs.measured import MICRO_BATCHES, Choice
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.schedule.stages import RunStage
from megatron_spdf.tables import GIB, Column, Table

LARGEST_ON_CPU = 4
STEPS = 3  # the first sets up and is not timed
Teach = Callable[[Engine], None]


def _no_teacher(engine: Engine) -> None:
    """Leaves an engine as it is."""


@dataclass(frozen=True)
class Timing:
    """Time and memory of steps with one micro-batch, the largest of all ranks.

    Attributes:
        seconds: of the fastest step; infinite if memory did not suffice.
        peak: bytes allocated at most.
        next_peak: upper bound of the peak in bytes at twice the micro-batch, at which weights and
            optimizer state are the same.
    """

    micro_batch: int
    seconds: float
    peak: float
    next_peak: float


def choose_micro_batch(stage: RunStage, run: RunDir, device: torch.device,
                       teach: Teach = _no_teacher) -> tuple[RunStage, list[str]]:
    """Replaces `auto` by a number. All ranks call.

    Candidates are timed on engines of their own, which are closed afterwards, so that training
    starts as it does without them.

    Args:
        teach: puts a teacher beside the model of each.

    Returns:
        The stage with its micro-batch, and lines for the log.

    Raises:
        ValueError: not even one sequence fits in memory.
    """
    if stage.recipe.train.micro_batch != AUTO:
        return stage, []
    key = {"stage": stage.number, **_layout(stage.recipe, device)}
    kept = _read(run)
    chosen = next((entry["micro_batch"] for entry in kept if entry.get("of") == key), None)
    lines = [f"micro-batch {chosen}, as chosen when this run first had this layout"]
    if chosen is None:
        trials = list(try_all(stage, device, teach))
        chosen = fastest(trials)
        lines = _render(trials, chosen)
        if dist.get_rank() == 0:
            run.create()
            _write(run, [*kept, {"of": key, "micro_batch": chosen,
                                 "trials": [asdict(t) for t in trials]}])
    return replace(stage, recipe=stage.recipe.with_micro_batch(chosen)), lines


def candidates(recipe: Recipe, largest: int) -> list[int]:
    """Powers of two up to `largest` that break no rule of the recipe."""
    sizes = [2**n for n in range(largest.bit_length()) if 2**n <= largest]
    return [size for size in sizes if not any(rule_violations(recipe.with_micro_batch(size)))]


def try_all(stage: RunStage, device: torch.device,
            teach: Teach = _no_teacher) -> Iterator[Timing]:
    """Times micro-batches from one sequence up, until the next would not fit in memory."""
    on_gpu = device.type == "cuda"
    room = USABLE * torch.cuda.get_device_properties(device).total_memory if on_gpu else math.inf
    for size in candidates(stage.as_single_run, LARGEST_MICRO_BATCH if on_gpu else LARGEST_ON_CPU):
        trial = _try(replace(stage, recipe=stage.recipe.with_micro_batch(size)), device,
                     teach)
        yield trial
        # not tried: a rank that runs out of memory leaves the others in a collective
        if trial.next_peak > room:
            return


def fastest(trials: list[Timing]) -> int:
    """Micro-batch of the fastest steps, of equally fast ones the smallest.

    Raises:
        ValueError: none fits in memory.
    """
    best = min(trials, key=lambda trial: trial.seconds)
    if math.isinf(best.seconds):
        raise ValueError(f"train.micro_batch={AUTO}: a step with micro-batch {best.micro_batch} "
                         "does not fit memory; raise parallel.tensor, parallel.pipeline or "
                         "parallel.zero_stage, or set train.recompute=full")
    return best.micro_batch


def _try(stage: RunStage, device: torch.device, teach: Teach = _no_teacher) -> Timing:
    size = stage.recipe.train.micro_batch
    PROGRESS.set_activity(f"the trial of micro-batch {size}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        seconds, held = _run(stage, device, teach)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else held
    except torch.OutOfMemoryError:
        if dist.get_world_size() > 1:  # the other ranks are left in a collective
            raise ValueError(f"train.micro_batch={AUTO}: a step with micro-batch {size} did not "
                             f"fit in the memory of rank {dist.get_rank()}; set train.micro_batch "
                             "to a smaller number") from None
        seconds = peak = math.inf
        held = 0
    # Twice the micro-batch at most doubles what is not weights, gradients and optimizer state.
    # All ranks must choose alike, so they go by the worst of them.
    shared = torch.tensor([seconds, peak, 2 * peak - held], dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return Timing(size, *shared.tolist())


def _run(stage: RunStage, device: torch.device, teach: Teach = _no_teacher) -> tuple[float, int]:
    """Seconds of the fastest step after the first, and bytes of weights, gradients and optimizer
    state."""
    recipe = stage.as_single_run
    engine = make_engine(recipe, stage.plan, device)
    try:
        teach(engine)
        batch, seconds = _random_batch(recipe, engine), []
        for number in range(1, STEPS + 1):
            started = time.perf_counter()
            engine.step(batch, number, recipe.tokens_per_step, stop_requested=False)
            if device.type == "cuda":
                # else the time of launches would be measured
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:]), sum(engine.state_bytes().values())
    finally:
        engine.close()


def _random_batch(recipe: Recipe, engine: Engine) -> list[MicroBatch]:
    """Micro-batches of this rank, all of the same random tokens."""
    if not engine.needs_batches:
        return [{}] * recipe.micro_batches
    shape = (recipe.train.micro_batch, recipe.train.sequence_length)
    tokens = torch.randint(recipe.model.vocab_size, shape,
                           generator=torch.Generator().manual_seed(recipe.seed))
    micro = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(shape),
             "position_ids": torch.arange(shape[1]).expand(shape).contiguous()}
    if recipe.data.reset_attention:
        micro["documents"] = torch.zeros(shape, dtype=torch.int64)
    return [micro] * recipe.micro_batches


def _layout(recipe: Recipe, device: torch.device) -> dict:
    """Settings that a choice is valid for, as JSON has them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "engine": recipe.engine, "recompute": recipe.train.recompute,
            **recipe.parallel.model_dump(exclude={"timeout"})}


def _read(run: RunDir) -> list[Choice]:
    """Reads recorded choices on rank 0, for every rank.

    Raises:
        ValueError: on all ranks alike: the record is damaged.
    """
    file, found, fault = run.root / MICRO_BATCHES, [], ""
    if dist.get_rank() == 0 and file.is_file():
        try:
            found = read_json(file, list[Choice], constants=True,
                              remedy="remove it, so that the run chooses anew")
        except ValueError as error:
            fault = str(error)
    shared = [found, fault]
    dist.broadcast_object_list(shared, src=0)
    if shared[1]:
        raise ValueError(shared[1])
    return shared[0]


def _write(run: RunDir, entries: list[Choice]) -> None:
    write_json(run.root / MICRO_BATCHES, entries)


def _render(trials: list[Timing], chosen: int) -> list[str]:
    table = Table([Column("micro-batch", "micro_batch", "d"), Column("seconds", form=".4g"),
                   Column("peak memory", "peak", ".2f", GIB)], trials)
    return [f"micro-batch {chosen} is the fastest of those tried:", table.text("  ")]
