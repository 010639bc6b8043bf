"""What the planner says of a step, to stand beside what was measured."""

from __future__ import annotations

from functools import cache

import torch

from benchmarks.environment import device_name
from megatron_spdf.planning.activations import peak_bytes
from megatron_spdf.planning.hardware import GPUS, Gpu, measure_this_machine
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.step_time import step_time
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.calibrate import efficiency_of
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import GIB


@cache
def this_card() -> Gpu:
    """The planner's row of this machine's GPU; of one that it has none for, and of a CPU, measured
    rates."""
    name = device_name() if torch.cuda.is_available() else ""
    known = (gpu for gpu in GPUS.values() if gpu.name in name)
    return next(known, None) or measure_this_machine("bf16" if name else "fp32", 1024, 0.05)


def predicted(recipe: Recipe) -> dict[str, float]:
    """Columns of the planner's bytes and seconds, as it has them before anything is calibrated."""
    plan = Plan.of(recipe)
    held = rank_bytes(recipe, plan, 0, on_gpu=True)
    return {"planned step (s)": step_time(recipe, plan, this_card()).total,
            "planned peak (GiB)": peak_bytes(recipe, plan, 0) / GIB.size,
            "planned state (GiB)": (held.parameters + held.gradients + held.optimizer) / GIB.size}


def calibrated(recipes: dict[str, Recipe], seconds: dict[str, float]) -> list[dict]:
    """Rows of measured steps beside those predicted with the efficiency at which the planner has
    the first one right.

    Args:
        seconds: measured, of each recipe.

    Raises:
        ValueError: no efficiency explains the first.
    """
    names, card = [name for name in recipes if name in seconds], this_card()
    first = next(iter(recipes))
    if first not in seconds:
        raise ValueError(f"{first} was not measured, and the planner is calibrated on it")
    efficiency = efficiency_of(recipes[first], Plan.of(recipes[first]), card, seconds[first])
    rows = []
    for name in names:
        there = step_time(recipes[name], Plan.of(recipes[name]), card, efficiency).total
        rows.append({"what": name, "efficiency": efficiency, "measured step (s)": seconds[name],
                     "predicted step (s)": there, "predicted / measured": there / seconds[name]})
    return rows
