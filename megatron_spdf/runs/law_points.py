"""Finished runs as points of the sparse scaling law."""

from __future__ import annotations

from statistics import mean

from megatron_spdf.architecture.base import Weight
from megatron_spdf.runs.measured import MeasuredRun
from megatron_spdf.scaling_law.fit import Point


def point_of(run: MeasuredRun) -> Point | None:
    """Makes a point of a run, with the last validation loss, else the mean of the last tenth of
    training losses.

    Returns:
        None where the loss at the end is not finite.

    Raises:
        ValueError: the run is not at its end, where its learning rate has decayed.
    """
    if not run.finished:
        raise ValueError(f"{run.directory} is at step {run.train[-1]['step']:,} of "
                         f"{run.recipe.steps:,}; a loss counts at the end of its schedule only: "
                         "finish the run or leave it out")
    if run.recipe.stages:
        raise ValueError(f"{run.directory} changed its sparsity in stages, and the law is of one "
                         "sparsity; leave it out")
    plan = run.plan
    weights = sum(w.numel for w in linear_weights(run))
    nonzero = weights - plan.numel + plan.active
    last = run.valid[-1:] or run.train[-max(1, len(run.train) // 10):]
    if any(r["loss"] is None for r in last):
        return None
    loss = mean(r["loss"] for r in last)
    return Point(1.0 - nonzero / weights, nonzero, run.train[-1]["tokens"], loss, run.name)


def linear_weights(run: MeasuredRun) -> list[Weight]:
    """Linear weights of the run's model, sparse or not."""
    return [w for w in run.recipe.model.weights() if w.linear]
