"""Training as it runs: tokens a second, TFLOP/s, MFU and peak memory of a recipe, dense beside its
sparsity, in one process and in turn, by stretches of steps that nothing waits for in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.engines import allocated, build_engine, joined, peak_of, take_steps
from benchmarks.step import WARM_UP, figures_of, render_choices, state_bytes
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.tables import GIB, SECONDS, Column, Table, named

STRETCHES = 4


@dataclass
class Run:
    """An engine at work.

    Attributes:
        held: bytes that it keeps on the GPU between steps.
        peak: most bytes in a step; None without a GPU.
        seconds: of a step, one figure a stretch.
    """

    recipe: Recipe
    engine: Any
    held: int
    step: int = WARM_UP
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)

    def advance(self, steps: int) -> None:
        """One stretch."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        take_steps(self.recipe, self.engine, range(self.step + 1, self.step + 1 + steps))
        torch.cuda.synchronize()
        self.seconds.append((time.perf_counter() - started) / steps)
        self.step += steps

    @property
    def figures(self) -> dict:
        return {**figures_of(self.recipe, self.engine, self.seconds), "peak_bytes": self.peak}


def start(recipe: Recipe, device: torch.device, quick: bool = False,
          prepare: Callable[[Any], None] = lambda engine: None) -> Run:
    """Builds an engine and warms it up, which gives the optimizer its state.

    Args:
        prepare: called with the engine before its first step.
    """
    before = allocated()
    engine = build_engine(recipe, device, quick)
    prepare(engine)
    take_steps(recipe, engine, range(1, WARM_UP))
    run = Run(recipe, engine, allocated() - before)
    run.peak = peak_of(lambda: take_steps(recipe, engine, range(WARM_UP, WARM_UP + 1)), run.held)
    return run


def row_of(figures: dict) -> dict:
    """Columns that all tables of training share; `figures` of a `Run`, or as much of them as a
    peer has."""
    peak, state = figures["peak_bytes"], figures.get("state_bytes")
    return {"sparsity (%)": 100 * figures["sparsity"], "step (s)": figures["step_seconds"],
            "tokens/s": figures["tokens_per_second"], "TFLOP/s": figures["tflops_per_rank"],
            "MFU (%)": figures["mfu"] and 100 * figures["mfu"],
            "peak memory (GiB)": peak and peak / 2**30,
            "state (GiB)": state and sum(state.values()) / 2**30}


def measure_training(recipes: dict[str, Recipe], steps: int) -> dict[str, dict]:
    """Figures of every recipe.

    Args:
        steps: of each, in stretches that alternate.
    """
    with joined(next(iter(recipes.values()))) as device:
        runs = {name: start(recipe, device) for name, recipe in recipes.items()}
        for _ in range(STRETCHES):
            for run in runs.values():
                run.advance(max(1, steps // STRETCHES))
        return {name: run.figures for name, run in runs.items()}


def render_training(runs: dict[str, dict]) -> list[str]:
    columns = [Column("", "name"), Column("sparsity", form=".2%"),
               Column("tokens/s", "tokens_per_second", ",.0f"),
               Column("step", "step_seconds", ".4f", SECONDS),
               Column("TFLOP/s", "tflops_per_rank", ".3g"), Column("MFU", "mfu", ".1%"),
               Column("peak memory", lambda f: f["peak_bytes"] or None, ".2f", GIB),
               Column("state", state_bytes, ".3f", GIB)]
    return [Table(columns, named(runs)).markdown(), "", *render_choices(runs), "",
            "tokens a second, sparse over dense: "
            f"{runs['sparse']['tokens_per_second'] / runs['dense']['tokens_per_second']:.3f}"]
