"""One part of the suite, in a process of its own.

    python -m benchmarks.suite_parts PART SCALE ROWS.jsonl SECONDS

A row is written as soon as it is there. What fails, runs out of memory or is not installed has a
row that says so, and the next begins; nothing begins when the seconds are nearly spent.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from benchmarks import baselines, max_depth, sizes
from benchmarks.engines import free_memory
from benchmarks.sizes import Scale
from megatron_spdf.files import open_to_append
from megatron_spdf.kernels.dispatch import backend_name
from megatron_spdf.kernels.tiles import tile_products
from megatron_spdf.kernels.two_four import two_four_products
from megatron_spdf.layers.products.base import product_of
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.text import first_line

NEARLY = 0.85  # of the seconds


@dataclass
class Part:
    """Where a part writes, and until when.

    Attributes:
        until: on the monotonic clock.
    """

    scale: Scale
    file: Path
    until: float

    def write(self, table: str, **row: object) -> None:
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        with open_to_append(self.file) as file:
            file.write(json.dumps({"table": table, "row": {**row, "at": at}}).encode() + b"\n")

    def attempt(self, table: str, what: str, measure: Callable[[], None]) -> bool:
        """Measures, unless time is short; whether it went well."""
        if time.monotonic() > self.until:
            self.write(table, what=what, note="not begun: the part's time was nearly spent")
            return False
        try:
            measure()
        except Exception as error:  # of whatever library: the others are to have their turn
            self.write(table, what=what,
                       note=f"failed, {type(error).__name__}: {first_line(error)}")
            return False
        finally:
            free_memory()
        return True


def kernels(part: Part) -> None:
    """A copy; expand and compress against it; products of tiles and 2:4 weights, and stk's, against
    dense ones."""
    from benchmarks import kernel_throughput

    device, seconds = torch.device("cuda" if torch.cuda.is_available()
                                   else "cpu"), part.scale.seconds
    bandwidth = kernel_throughput.copy_bandwidth(device, seconds)
    part.write("copy", **{"GB/s, read and written": bandwidth / 1e9})
    dtype = sizes.dtype_of(part.scale.recipe(sizes.DENSE))
    for what, by in (("expand, compress", backend_name(device.type)),
                     ("2:4", two_four_products(device.type, dtype)[1]),
                     *((f"tiles of {n}", tile_products(device.type, n, dtype)[1])
                       for n in part.scale.tiles)):
        part.write("what computes", what=what, by=by)
    for name, pattern in part.scale.patterns.items():
        recipe = part.scale.recipe(pattern)
        if recipe.sparsity.dense_copy == "layer":
            continue  # the same kernels as for the step
        part.attempt("kernels", name, lambda name=name,
                     recipe=recipe: _layer(part, name, recipe, bandwidth, device))
    tiles = part.scale.recipe(part.scale.patterns[f"tiles of {part.scale.tiles[-1]}, 75%"])
    part.attempt("kernels", "stanford-stk", lambda: _stk(part, tiles, device))


def _layer(part: Part, name: str, recipe: Recipe, bandwidth: float, device: torch.device) -> None:
    """The weights of one layer: expanded and compressed if they are unstructured, multiplied
    otherwise."""
    from benchmarks import kernel_throughput

    plan, dtype, tokens = Plan.of(recipe), sizes.dtype_of(recipe), sizes.tokens_of(recipe)
    for weight in (w for n, w in plan.weights.items() if ".layers.0." in n):
        place = plan.seed, 1, device, dtype
        if product_of(weight.pattern) is None:
            figures = kernel_throughput.moves(weight, *place, bandwidth, part.scale.seconds)
        else:
            figures = kernel_throughput.products(weight, *place, tokens, part.scale.seconds)
        for f in figures:
            part.write("kernels", what=name, kernel=f.kernel, weight=f"{f.shape[0]} x {f.shape[1]}",
                       **{"time (us)": f.seconds * 1e6, "floor / time": f.floor / f.seconds,
                          "dense / time": f.dense and f.dense / f.seconds,
                          "torch / time": f.torch and f.torch / f.seconds})


def _stk(part: Part, recipe: Recipe, device: torch.device) -> None:
    plan = Plan.of(recipe)
    for weight in (w for n, w in plan.weights.items() if ".layers.0." in n):
        for kernel, seconds, dense in baselines.stk_products(weight, plan.seed, device,
                                                             sizes.tokens_of(recipe),
                                                         part.scale.seconds):
            part.write("kernels", what="stanford-stk", kernel=kernel,
                       weight=f"{weight.shape[0]} x {weight.shape[1]}",
                       **{"time (us)": seconds * 1e6,
                          "floor / time": (1.0 - weight.sparsity) * dense / seconds,
                          "dense / time": dense / seconds})


def training(part: Part) -> None:
    """Every pattern trained, dense before and after it all, since a card's clock changes as it gets
    warm."""
    from benchmarks.engines import joined

    runs = {"dense": sizes.DENSE, **part.scale.patterns, "dense, again": sizes.DENSE}
    seconds: dict[str, float] = {}
    with joined(part.scale.recipe(sizes.DENSE)) as device:
        for name, pattern in runs.items():
            recipe = part.scale.recipe(pattern)
            part.attempt("training", name, lambda name=name,
                         recipe=recipe: _train(part, name, recipe, device, seconds))


def _train(part: Part, name: str, recipe: Recipe, device: torch.device,
           seconds: dict[str, float]) -> None:
    """Args:
        seconds: of a step of each run so far; this one's is put there.
    """
    from benchmarks import train
    from benchmarks.breakdown import measure_parts

    run = train.start(recipe, device, quick=True)
    try:
        for _ in range(train.STRETCHES):
            run.advance(part.scale.steps // train.STRETCHES)
        figures = run.figures
        seconds[name] = figures["step_seconds"]
        faster = seconds["dense"] / seconds[name] if "dense" in seconds else None
        part.write("training", what=name, **row_of_training(figures), **{"dense / step": faster})
        part.write("what computes", what=name, by=figures["choices"])
        parts = measure_parts(recipe, run.engine,
                              range(run.step + 1, run.step + 1 + part.scale.by_part))
        part.write("a step by part (ms)", what=name,
                   **{k: 1e3 * spent for k, spent in parts.items()})
    finally:
        run.engine.close()


def row_of_training(figures: dict) -> dict:
    """Columns that all tables of training share; `figures` of `train.Run`, or as much of them as a
    peer has."""
    peak, state = figures["peak_bytes"], figures.get("state_bytes")
    return {"sparsity (%)": 100 * figures["sparsity"], "step (s)": figures["step_seconds"],
            "tokens/s": figures["tokens_per_second"], "TFLOP/s": figures["tflops_per_rank"],
            "MFU (%)": figures["mfu"] and 100 * figures["mfu"],
            "peak memory (GiB)": peak and peak / 2**30,
            "state (GiB)": state and sum(state.values()) / 2**30}


def peers_of_training(part: Part) -> None:
    """What one would use instead: plain PyTorch, and Megatron-Core with masks multiplied into dense
    weights."""
    dense = part.scale.recipe(sizes.DENSE)
    for name, measure in baselines.TRAINED.items():
        part.attempt("peers", name, lambda name=name, measure=measure: part.write(
            "peers", what=name, **row_of_training(measure(dense, part.scale.steps))))


def largest_model(part: Part) -> None:
    """The deepest GPT of a width that trains on this card: by the planner, then tried."""
    from benchmarks.engines import joined

    deep = "unstructured 75%, layer by layer"
    with joined(part.scale.recipe(sizes.DENSE)) as device:
        for name, pattern in (("dense", sizes.DENSE), (deep, part.scale.patterns[deep])):
            recipe = part.scale.deep_recipe(pattern)
            half = time.monotonic() + (part.until - time.monotonic()) / (2 if name == "dense"
                                                                         else 1)
            part.attempt("largest", name, lambda name=name, recipe=recipe, half=half: _search(
                part, name, recipe, device, half))


def _search(part: Part, name: str, recipe: Recipe, device: torch.device, until: float) -> None:
    for row in max_depth.search(recipe, device, sizes.memory(), part.scale.tries, until):
        part.write("largest", what=name, **row)


PARTS = {"kernels": kernels, "training": training, "peers": peers_of_training,
         "largest": largest_model}


def main() -> None:
    name, scale, file, seconds = sys.argv[1:]
    PARTS[name](Part(sizes.scale_of(scale), Path(file), time.monotonic() + NEARLY * float(seconds)))


if __name__ == "__main__":
    main()
