"""Calibration: the efficiency of matrix products at which the planner predicts the measured step
time of a run."""

from __future__ import annotations

from statistics import median

from scipy.optimize import brentq

from megatron_spdf.planning.hardware import Gpu
from megatron_spdf.planning.step_time import step_time
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.measured import MeasuredRun
from megatron_spdf.sparsity.plan import Plan

LOWEST, HIGHEST = 0.01, 1.0


def measured_step(run: MeasuredRun) -> float:
    """Median seconds of a step, without the first fifth of the records, which hold warm-up and
    compilation.

    Raises:
        ValueError: the log has none.
    """
    seconds = [r["step_seconds"] for r in run.train if "step_seconds" in r]
    if not seconds:
        raise ValueError(f"the log of {run.directory} has no step_seconds; calibrate with a run "
                         "whose log is whole")
    return median(seconds[len(seconds) // 5:])


def calibrate(run: MeasuredRun, gpu: Gpu) -> float:
    """Finds the efficiency in (0, 1], for the recipe and the layout of the run.

    Args:
        run: gives the measured step time.
        gpu: the one that it ran on.

    Raises:
        ValueError: the run was on another device, or no efficiency explains its time.
    """
    device = run.bytes.get("choices", "").partition(";")[0].removeprefix("device ")
    if device and gpu.name not in device:
        raise ValueError(f"{run.directory} ran on {device}, not on {gpu.name}; calibrate with a "
                         "run on the GPU that --gpu names, or name that one")
    return efficiency_of(run.recipe, run.plan, gpu, measured_step(run), str(run.directory))


def efficiency_of(recipe: Recipe, plan: Plan, gpu: Gpu, measured: float,
                  what: str = "the recipe") -> float:
    """Finds the efficiency in (0, 1] at which a step takes as long as measured.

    Args:
        measured: seconds.
        what: was measured, for messages.

    Raises:
        ValueError: none explains them.
    """
    def late(efficiency: float) -> float:
        return step_time(recipe, plan, gpu, efficiency).total - measured

    if late(HIGHEST) > 0.0:
        fastest = late(HIGHEST) + measured
        raise ValueError(f"a step of {what} took {measured:.4g} s, less than the "
                         f"{fastest:.4g} s that a {gpu.name} needs at its peak rates; was it "
                         f"another GPU, or --gpu {gpu.name} with other rates?")
    if late(LOWEST) < 0.0:
        raise ValueError(f"a step of {what} took {measured:.4g} s, which would be under "
                         f"{LOWEST:.0%} of {gpu.name}'s peak; was it another device?")
    return float(brentq(late, LOWEST, HIGHEST, xtol=1e-9))
