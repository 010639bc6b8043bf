"""Seconds of an optimizer step of a recipe, dense against its sparsity, both engines in one process
and their steps in turn, so that what else the machine does hits both alike; and where those seconds
go."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.breakdown import measure_parts, render_parts
from benchmarks.engines import build_engine, joined, synthetic_batch
from benchmarks.environment import device_name
from megatron_spdf.planning.hardware import peak_flops
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import MIB, SECONDS, Column, Table, named

WARM_UP, BY_PART = 2, 3  # steps


def measure_steps(recipes: dict[str, Recipe], steps: int) -> dict[str, dict]:
    """Runs the recipes' engines step by step in turn; returns the figures of each."""
    first, seconds = next(iter(recipes.values())), {name: [] for name in recipes}
    with joined(first) as device:
        engines = {name: build_engine(recipe, device) for name, recipe in recipes.items()}
        gc.disable()
        for number in range(1, WARM_UP + steps + 1):
            batch = synthetic_batch(first, number)
            for name, engine in engines.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                engine.step(batch, number, number * first.tokens_per_step, False)
                torch.cuda.synchronize()
                if number > WARM_UP:
                    seconds[name].append(time.perf_counter() - started)
        gc.enable()
        numbers = range(number + 1, number + 1 + min(BY_PART, steps))
        return {name: {**figures_of(recipes[name], engine, seconds[name]),
                       "parts": measure_parts(recipes[name], engine, numbers)} for name,
                engine in engines.items()}


def figures_of(recipe: Recipe, engine, seconds: Sequence[float]) -> dict:
    """Median and quartiles of the step time, and the rates that follow from the median. TFLOP/s and
    MFU are as in the log of a run: of the matrix products as dense ones, but those of blocks, of
    which only the active ones count; 2:4 weights count whole, on sparse tensor cores too."""
    skipped = engine.plan.skipped if engine.device.type == "cuda" else None
    return {"sparsity": engine.plan.sparsity, "engine": recipe.engine,
            **rates(recipe, seconds, skipped),
            "state_bytes": engine.state_bytes(),
            "choices": engine.choices}


def rates(recipe: Recipe, seconds: Sequence[float], skipped: Plan | None = None) -> dict:
    """Median and quartiles of seconds of a step, and what follows from the median.

    Args:
        skipped: weights whose zeros are not multiplied.
    """
    low, middle, high = statistics.quantiles(seconds, n=4)
    executed = training_flops(recipe.model, recipe.train.sequence_length,
                              skipped).total * recipe.tokens_per_step
    rate = executed / middle / recipe.parallel.world
    peak = peak_flops(device_name(), recipe.train.precision)
    return {
        "step_seconds": middle,
        "quartiles": [low, high],
        "tokens_per_second": recipe.tokens_per_step / middle,
        "tflops_per_rank": rate / 1e12,
        "mfu": rate / peak if peak else None,
    }


def render_steps(runs: dict[str, dict]) -> list[str]:
    columns = [Column("", "name"), Column("sparsity", form=".2%"),
               Column("step, median", "step_seconds", ".4f", SECONDS),
               Column("quartiles", lambda f: " - ".join(f"{s:.4f}" for s in f["quartiles"])),
               Column("tokens/s", "tokens_per_second", ",.0f"),
               Column("TFLOP/s", "tflops_per_rank", ".3g"), Column("MFU", "mfu", ".1%"),
               Column("state", state_bytes, ",.1f", MIB)]
    return [Table(columns, named(runs)).markdown(), "",
            *render_parts({name: f["parts"] for name, f in runs.items()}), "",
            *render_choices(runs), "",
            "step time, sparse over dense: "
            f"{runs['sparse']['step_seconds'] / runs['dense']['step_seconds']:.3f}"]


def render_choices(runs: dict[str, dict]) -> list[str]:
    """A line on each run: its engine, and which implementation computed what."""
    return [f"{name}: engine {f['engine']}; {f['choices']}" for name, f in runs.items()]


def state_bytes(figures: dict) -> int:
    """Bytes of weights, gradients and optimizer of a rank."""
    return sum(figures["state_bytes"].values())
