"""One part of the suite, in a process of its own.

    python -m benchmarks.suite_parts PART SCALE ROWS.jsonl SECONDS

A row is written as soon as it is there. What fails, runs out of memory or is not installed has a
row that says so, and the next begins; nothing begins when the seconds are nearly spent.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from benchmarks import baselines, host, max_depth, predictions, sizes, train
from benchmarks.engines import end_with_parent
from benchmarks.part import Part
from megatron_spdf.kernels.dispatch import backend_name
from megatron_spdf.kernels.tiles import tile_products
from megatron_spdf.kernels.two_four import two_four_products
from megatron_spdf.layers.products.base import product_of
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan

NEARLY = 0.85  # of the seconds


def kernels(part: Part) -> None:
    """Times a copy, and expand and compress against it. Times products of tiles and of 2:4 weights,
    and stk's, against dense ones."""
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
        if recipe.sparsity.dense_copy == "per_layer":
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
    """The weights of one layer, multiplied by stanford-stk."""
    plan = Plan.of(recipe)
    for weight in (w for n, w in plan.weights.items() if ".layers.0." in n):
        for kernel, seconds, dense in baselines.stk_products(
                weight, plan.seed, device, sizes.tokens_of(recipe), part.scale.seconds):
            part.write("kernels", what="stanford-stk", kernel=kernel,
                       weight=f"{weight.shape[0]} x {weight.shape[1]}",
                       **{"time (us)": seconds * 1e6,
                          "floor / time": (1.0 - weight.sparsity) * dense / seconds,
                          "dense / time": dense / seconds})


def training(part: Part) -> None:
    """Trains every pattern, and dense before and after it all, since a card's clock changes as it
    gets warm. On a GPU each is trained with forward and backward as one CUDA graph too. Ratios are
    over the faster dense run so far. The planner, with the efficiency of the dense run, is beside
    them."""
    from benchmarks.engines import joined

    patterns = {"dense": sizes.DENSE, **part.scale.patterns, "dense, again": sizes.DENSE}
    ways = ("launched one by one", "one CUDA graph")[: 1 + torch.cuda.is_available()]
    recipes = {name if way == ways[0] else f"{name}, {way}": part.scale.recipe(
        pattern, *host.WAYS[way][0]) for name, pattern in patterns.items() for way in ways}
    seconds: dict[str, float] = {}
    with joined(recipes["dense"]) as device:
        for name, recipe in recipes.items():
            part.attempt("training", name, lambda name=name, recipe=recipe: _train(
                part, "training", name, recipe, device, seconds,
                # of a graph the host sees no parts
                by_part=0 if recipe.kernels.cuda_graph else part.scale.by_part))
    replace(part, until=math.inf).attempt("planner", "dense", lambda: [
        part.write("planner", **row) for row in predictions.calibrated(recipes, seconds)])


def families(part: Part) -> None:
    """Models of other families, dense and sparse."""
    from benchmarks.engines import joined

    for family, model in part.scale.families.items():
        seconds: dict[str, float] = {}
        recipes = {name: part.scale.family(model, pattern)
                   for name, pattern in {"dense": sizes.DENSE, **part.scale.few}.items()}
        with joined(recipes["dense"]) as device:
            for name, recipe in recipes.items():
                part.attempt("families", f"{family}, {name}", lambda name=name, recipe=recipe,
                             family=family, seconds=seconds, device=device: _train(
                                 part, "families", name, recipe, device, seconds, f"{family}, "))


def _train(part: Part, table: str, name: str, recipe: Recipe, device: torch.device,
           seconds: dict[str, float], of: str = "", by_part: int = 0) -> None:
    """Args:
        seconds: of a step of each run so far; this one's is put there.
        of: what stands before the name in tables.
        by_part: steps whose parts are timed.
    """
    from benchmarks.breakdown import measure_parts

    run = train.start(recipe, device, quick=True)
    try:
        for _ in range(train.STRETCHES):
            run.advance(max(1, part.scale.steps // train.STRETCHES))
        figures = run.figures
        seconds[name] = figures["step_seconds"]
        dense = [spent for run, spent in seconds.items() if run.startswith("dense")]
        faster = min(dense) / seconds[name] if dense else None
        part.write(table, what=f"{of}{name}", **train.row_of(figures),
                   **predictions.predicted(recipe), **{"dense / step": faster})
        part.write("what computes", what=f"{of}{name}", by=figures["choices"])
        if by_part:
            parts = measure_parts(recipe, run.engine, range(run.step + 1, run.step + 1 + by_part))
            part.write("a step by part (ms)", what=f"{of}{name}",
                       **{k: 1e3 * spent for k, spent in parts.items()})
    finally:
        run.engine.close()


def moves_of_masks(part: Part) -> None:
    """What a choice of masks takes, and what every mask algorithm adds to a run."""
    from benchmarks import moves
    from benchmarks.engines import joined

    part.attempt("choices of masks", "choices", lambda: _choices(part))
    with joined(part.scale.recipe(sizes.DENSE)) as device:
        for name, recipe in part.scale.moving().items():
            part.attempt("moves", name, lambda name=name, recipe=recipe: part.write(
                "moves", what=name, **row_of_moves(
                    moves.measure_one(recipe, device, part.scale.moves, quick=True))))


def _choices(part: Part) -> None:
    """Of the weights of the large model's first layer."""
    from benchmarks import moves

    recipe = part.scale.recipe("{level: 0.75, algorithm: top_kast}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for weight in (w for n, w in Plan.of(recipe).weights.items() if ".layers.0." in n):
        for found in moves.time_choices(weight, device, sizes.dtype_of(recipe),
                                        part.scale.seconds / 5):
            part.write("choices of masks", weight=f"{weight.shape[0]} x {weight.shape[1]}",
                       by=found["by"], **{
                "active (us)": 1e6 * found["active"],
                "with twice as many (us)": 1e6 * found["with twice as many"],
                "GB/s of the weight, active": found["bytes"] / found["active"] / 1e9})


def row_of_moves(figures: dict) -> dict:
    return {"sparsity (%)": 100 * figures["sparsity"], "step (s)": figures["step_seconds"],
            "longer with a move (s)": figures["longer_seconds"],
            "the move alone (s)": figures["move_seconds"], "every": figures["every"],
            "of a run (%)": 100 * figures["share"],
            **{f"{what} (s)": spent for what, spent in figures.get("border_seconds", {}).items()}}


def small_model(part: Part) -> None:
    """A model whose launches the host may be too slow for: launched one by one, as a CUDA graph,
    and compiled."""
    from benchmarks.engines import joined

    patterns = {"dense": sizes.DENSE, **part.scale.few}
    with joined(part.scale.small_recipe(sizes.DENSE)) as device:
        for (way, (overrides, prepare)), (name, pattern) in product(host.WAYS.items(),
                                                                    patterns.items()):
            what, recipe = f"{name}, {way}", part.scale.small_recipe(pattern, *overrides)
            part.attempt("host", what, lambda what=what, prepare=prepare, recipe=recipe: part.write(
                "host", what=what, **host.measure(recipe, device, prepare, part.scale.steps)))


def peers_of_training(part: Part) -> None:
    """What one would use instead: plain PyTorch, and Megatron-Core with masks multiplied into dense
    weights."""
    dense = part.scale.recipe(sizes.DENSE)
    for name, measure in baselines.TRAINED.items():
        part.attempt("peers", name, lambda name=name, measure=measure: part.write(
            "peers", what=name, **train.row_of(measure(dense, part.scale.steps))))


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
         "moves": moves_of_masks, "families": families, "host": small_model,
         "largest": largest_model}


def main() -> None:
    end_with_parent()
    name, scale, file, seconds = sys.argv[1:]
    PARTS[name](Part(sizes.scale_of(scale), Path(file), time.monotonic() + NEARLY * float(seconds)))


if __name__ == "__main__":
    main()
