"""The deepest GPT of a width that trains on one card: as the planner has it, and as it turns
out."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.engines import build_engine, free_memory, peak_of, take_steps
from megatron_spdf.planning.activations import peak_bytes
from megatron_spdf.planning.search import USABLE
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan


def with_layers(recipe: Recipe, layers: int) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"layers": layers})})


def planned_bytes(recipe: Recipe) -> int:
    return peak_bytes(recipe, Plan.of(recipe), 0)


def deepest(recipe: Recipe, memory: int) -> int:
    """Most layers that by the planner's closed forms fit into `memory` bytes; 0 where not one
    does."""
    def fits(layers: int) -> bool:
        return planned_bytes(with_layers(recipe, layers)) <= USABLE * memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def search(recipe: Recipe, device: torch.device, memory: int, tries: int,
           until: float) -> Iterator[dict]:
    """Rows of a table: what the planner says, then what was tried, deeper by a tenth while it
    trains, or less deep until it does.

    Args:
        memory: bytes of the card.
        tries: at most.
        until: on the monotonic clock; no try begins that would not end by then if it took as long
            as the last.
    """
    layers = deepest(recipe, memory)
    yield {**_size(with_layers(recipe, layers)),
           "note": f"the planner's largest, in {USABLE:.0%} of the memory"}
    step, trained, seconds = max(1, layers // 10), None, 0.0
    for _ in range(tries):
        if layers < 1 or time.monotonic() + seconds > until:
            return
        started = time.monotonic()
        tried = with_layers(recipe, layers)
        peak = try_out(tried, device)
        seconds = time.monotonic() - started
        yield {**_size(tried), "note": "out of memory" if peak is None else "trained",
               "peak memory (GiB)": (peak or None) and peak / 2**30}
        if trained not in (None, peak is not None):
            return  # between the last two
        trained = peak is not None
        layers += step if trained else -step


def try_out(recipe: Recipe, device: torch.device) -> int | None:
    """Two steps; most bytes of tensors in the second, 0 without a GPU; None where memory ran
    out."""
    engine = None
    try:
        engine = build_engine(recipe, device, quick=True)
        take_steps(recipe, engine, range(1, 2))
        return peak_of(lambda: take_steps(recipe, engine, range(2, 3)),
                       torch.cuda.memory_allocated() if device.type == "cuda" else 0) or 0
    except torch.OutOfMemoryError:
        return None
    finally:
        if engine is not None:
            engine.close()
        free_memory()


def _size(recipe: Recipe) -> dict:
    weights, plan = recipe.model.weights(), Plan.of(recipe)
    whole = sum(w.numel for w in weights)
    return {"layers": recipe.model.layers, "weights (billions)": whole / 1e9,
            "active (billions)": (whole - plan.numel + plan.active) / 1e9,
            "planned (GiB)": planned_bytes(recipe) / 2**30}
