"""Finished runs as points of the sparse scaling law."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from megatron_spdf.architecture.base import Weight
from megatron_spdf.command_line import say
from megatron_spdf.paths import same_file
from megatron_spdf.runs.budget import average_weights
from megatron_spdf.runs.loss_table import read_table
from megatron_spdf.runs.measured import MeasuredRun, read_run
from megatron_spdf.scaling_law.points import Point


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
    return Point(1.0 - nonzero / weights, nonzero, run.train[-1]["tokens"], loss, run.name,
                 average_weights(run.recipe), run.recipe.sparsity.algorithm)


def linear_weights(run: MeasuredRun) -> list[Weight]:
    """Linear weights of the run's model, sparse or not."""
    return [w for w in run.recipe.model.weights() if w.linear]


class Training(NamedTuple):
    """A finished training, its directory or name, and whether no law is fitted to it."""

    point: Point
    place: str
    held_out: bool


def trainings(paths: Sequence[Path], texts: Sequence[str]) -> list[Training]:
    """Reads run directories and tables; says which run is left out, as its loss is not finite.

    Args:
        texts: runs with one of them in their place are held out too.

    Raises:
        ValueError: a run or a table cannot be read, a training is there twice, or no run has a
            text.
    """
    if twice := same_file([path for path in paths if path.exists()]):
        raise ValueError(f"{twice[0]} and {twice[1]} are one; name it once, as a law counts each "
                         "as a training of its own")
    found: list[Training] = []
    for path in paths:
        if path.is_file():
            found += [Training(row.point, row.point.name, row.held_out)
                      for row in read_table(path)]
        elif point := point_of(run := read_run(path)):
            found.append(Training(point, str(path), False))
        else:
            say(f"{run.directory} is left out: its loss at the end is not finite", sys.stderr)
    _require_apart(found)
    for text in texts:
        if not any(text in each.place for each in found):
            raise ValueError(f"--hold-out {text}: no run has that in its name; they are named like "
                             f"{found[0].place if found else 'nothing'}")
    return [each._replace(held_out=each.held_out or any(text in each.place for text in texts))
            for each in found]


def _require_apart(found: Sequence[Training]) -> None:
    """Raises a ValueError where a training is there twice, by whatever files: no two trainings of
    one length have one loss to its last digit."""
    seen: dict[tuple[float, ...], Training] = {}
    for each in found:
        point = each.point
        figures = (point.sparsity, point.nonzero, point.data, point.loss)
        first = seen.setdefault(figures, each)
        if first is not each and math.isfinite(point.loss):
            raise ValueError(f"{first.place} and {each.place} are one training, with the loss "
                             f"{point.loss:.6g} to its last digit; name it once, as a law counts "
                             "each as a training of its own")


def of_one_algorithm(trained: list[Training], algorithm: str | None) -> list[Training]:
    """Dense trainings, and those of one algorithm: the paper's form is of one way to be sparse.

    Raises:
        ValueError: none is of the algorithm.
    """
    there = {each.point.algorithm for each in trained if each.point.sparsity > 0.0}
    if algorithm is not None and algorithm not in there:
        raise ValueError(f"--algorithm {algorithm}: no run is of it; there are "
                         f"{', '.join(sorted(there)) or 'dense ones only'}")
    chosen = algorithm or ("static" if "static" in there else min(there, default=""))
    return [each for each in trained
            if each.point.sparsity == 0.0 or each.point.algorithm == chosen]
