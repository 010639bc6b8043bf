"""How far the mask algorithm of a checkpoint's run has come."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from megatron_spdf.checkpoint.reader import CheckpointReader
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.algorithms.base import MaskAlgorithm
from megatron_spdf.sparsity.plan import Plan


def mask_progress(reader: CheckpointReader) -> dict[str, Any] | None:
    """Collects name, moves, levels and overlap of the algorithm of a checkpoint, as plain values.

    Returns:
        `moves` done and `planned` in the whole run; `part` and number of `parts` of the stage, each
        with storage of its own; sparsity of the sparse weights `now` and at the `end` of the stage;
        `overlap`: of the active entries, those that were active at the beginning of the stage, in
        all and by the number of the layer; None where the algorithm does not track it. None: masks
        stay.
    """
    recipe, state = reader.recipe, reader.run["state"]
    algorithm = recipe.sparsity.update
    if algorithm.stays:
        return None
    begin, end = _stage_at(recipe, state["step"])
    steps = end - begin
    parts = algorithm.parts(steps)
    part = next(n for n, part in enumerate(parts, 1) if state["step"] - begin <= part.last)
    reached = (algorithm.share(state["optimizer_steps"], steps) if algorithm.holds
               else recipe.sparsity.reached)
    return {
        "name": algorithm.name,
        "moves": state["mask_updates"],
        "planned": sum(planned_moves(own, last - first) for own, first, last in _stages(recipe)),
        "part": part,
        "parts": len(parts),
        "now": _level(recipe, reached),
        "end": _level(recipe, algorithm.share(steps, steps)),
        **_overlaps(reader),
    }


def planned_moves(algorithm: MaskAlgorithm, steps: int) -> int:
    """The number of moves in a stage of so many steps: what is stored dense has no masks yet."""
    parts = algorithm.parts(steps)
    begins = [0, *(part.last for part in parts)]
    return sum(algorithm.due(step, steps)
               for part, first in zip(parts, begins, strict=False) if part.reached > 0.0
               for step in range(first + 1, part.last + 1))


def _stages(recipe: Recipe) -> list[tuple[MaskAlgorithm, int, int]]:
    """(algorithm, first step, last step) of every stage of a run."""
    if not recipe.stages:
        return [(recipe.sparsity.update, 0, recipe.steps)]
    return [(stage.sparsity.update, first, last) for stage, (first, last)
            in zip(recipe.stages, pairwise([0, *recipe.stage_ends]), strict=True)]


def _stage_at(recipe: Recipe, step: int) -> tuple[int, int]:
    """(first, last) step of the stage that a step belongs to."""
    return next((first, last) for _, first, last in _stages(recipe) if step <= last)


def _level(recipe: Recipe, reached: float) -> float:
    """Sparsity of the sparse weights at a share of their levels."""
    return Plan.of(recipe.stored_at(reached)).sparsity


def _overlaps(reader: CheckpointReader) -> dict[str, Any]:
    if not reader.recipe.sparsity.update.tracks:
        return {"overlap": None, "layers": {}}
    common: dict[int, int] = {}
    active: dict[int, int] = {}
    for name, planned in reader.plan.weights.items():
        layer = reader.weights[name].layer
        both = np.unpackbits(reader.mask_bits(name) & reader.first_bits(name))
        common[layer] = common.get(layer, 0) + int(both.sum(dtype=np.int64))
        active[layer] = active.get(layer, 0) + planned.active
    return {"overlap": sum(common.values()) / max(1, sum(active.values())),
            "layers": {str(layer): common[layer] / active[layer] for layer in sorted(active)}}


def render_progress(progress: dict[str, Any]) -> str:
    """Formats the result of `mask_progress` as a sentence."""
    done = (f"{progress['moves']:,} of {progress['planned']:,} moves" if progress["planned"]
            else "moves at borders of its parts only")
    part = f"part {progress['part']} of {progress['parts']}, " if progress["parts"] > 1 else ""
    said = (f"{progress['name']}, {part}{done}; sparsity {progress['now']:.2%} now, "
            f"{progress['end']:.2%} at the end")
    if progress["overlap"] is None:
        return said
    low, high = min(progress["layers"].values()), max(progress["layers"].values())
    return (f"{said}; {progress['overlap']:.2%} of the active entries are as at first, by layer "
            f"{low:.2%} to {high:.2%}")
