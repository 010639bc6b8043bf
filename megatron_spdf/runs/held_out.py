"""Predictions of the held-out cells of a grid, written down before a loss of theirs is looked at.

    size,masks,tokens_per_weight,form,runs,predicted,low,high

A prediction stays as it was written as soon as the losses of its cell are published.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from megatron_spdf.files import write_file
from megatron_spdf.records.values import typed
from megatron_spdf.runs.budget import active_weights, average_weights, linear_weights
from megatron_spdf.runs.experiment import Cell, Experiment
from megatron_spdf.runs.loss_table import LossRow
from megatron_spdf.scaling_law.fit import fit_law, shortcomings
from megatron_spdf.scaling_law.forms import FORMS
from megatron_spdf.scaling_law.points import DENSE, Point
from megatron_spdf.section import Section
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import read_csv

Positive = Annotated[float, Field(gt=0.0)]
Labels = tuple[tuple[str, str], ...]
ONE_ALGORITHM = "static"  # that the published form is fitted to, beside dense runs


class PredictionRow(Section):
    """Loss of a run of a held-out cell, by one form of the law.

    Attributes:
        labels: axis -> label of the grid.
        runs: to which the law was fitted.
        predicted, low, high: nats per token, with the 5% and the 95% quantile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: dict[str, str]
    form: str
    runs: int
    predicted: Positive
    low: Positive
    high: Positive


COLUMNS = [name for name in PredictionRow.model_fields if name != "labels"]


def of_form(points: Sequence[Point], form: str) -> list[Point]:
    """Points that a form is fitted to, or may predict: the published one is of one way to be
    sparse."""
    return [point for point in points
            if form != "published" or point.group == DENSE or point.algorithm == ONE_ALGORITHM]


def predict(cells: Sequence[Cell], experiment: Experiment, rows: Sequence[LossRow],
            starts: int, samples: int) -> list[PredictionRow]:
    """Predicts every held-out cell of a grid, by every form of the law that the other cells
    determine.

    Args:
        cells: of the grid.
        rows: of its table of losses; those that are held out are not looked at.
        starts, samples: see `fit_law`.
    """
    fitted = [row.point for row in rows if not row.held_out]
    groups = {point.group for point in fitted}
    held = [(cell.labels, _point(cell)) for cell in cells
            if any(labels.items() <= cell.labels.items() for labels in experiment.hold_out)]
    found = []
    for name, form in FORMS.items():
        own = of_form(fitted, name)
        if shortcomings(own, form):
            continue
        asked = [(labels, point) for labels, point in held if of_form([point], name)
                 and (name != "groups" or point.group in groups)]
        fit = fit_law(own, starts, samples, form=form, held_out=[point for _, point in asked])
        found += [PredictionRow(labels=labels, form=name, runs=len(own), predicted=p.predicted,
                                low=p.low, high=p.high)
                  for (labels, _), p in zip(asked, fit.predictions, strict=True)]
    return found


def _point(cell: Cell) -> Point:
    """A run of a cell, whose loss is not known."""
    recipe = next(iter(cell.recipes.values()))
    active, plan = active_weights(recipe), Plan.of(recipe)
    return Point(1.0 - active / linear_weights(recipe), active, recipe.train.tokens, math.nan,
                 ",".join(map("=".join, cell.labels.items())), average_weights(recipe),
                 recipe.sparsity.algorithm if plan.weights else DENSE)


def merged(before: Sequence[PredictionRow], now: Sequence[PredictionRow],
           published: Collection[Labels]) -> list[PredictionRow]:
    """Predictions as they were of cells whose losses are published, and new ones of the others.

    Args:
        published: labels of cells whose losses have been looked at.
    """
    kept = [row for row in before if labels_of(row) in published]
    return kept + [row for row in now if labels_of(row) not in published]


def labels_of(row: PredictionRow | LossRow) -> Labels:
    """Labels of a row as a key."""
    return tuple(sorted(row.labels.items()))


def write_predictions(path: Path, rows: Sequence[PredictionRow]) -> None:
    """Writes the table of the rows; without a row, none."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0].labels, *COLUMNS])
    for row in rows:
        writer.writerow([*row.labels.values(), row.form, row.runs,
                         *(f"{value:.6g}" for value in (row.predicted, row.low, row.high))])
    write_file(path, text.getvalue())


def read_predictions(path: Path) -> list[PredictionRow]:
    """Reads a table; none: no predictions.

    Raises:
        ValueError: a column is missing, or a value is no such number.
    """
    if not path.is_file():
        return []
    remedy = "write it again with tools/law_page.py predict"
    head, *lines = read_csv(path, "predictions", remedy)
    if missing := [column for column in COLUMNS if head.count(column) != 1]:
        raise ValueError(f"{path} is no table of predictions: it has not {missing[0]} once; "
                         f"{remedy}")
    axes = len(head) - len(COLUMNS)
    return [typed({"labels": dict(zip(head[:axes], line[:axes], strict=True)),
                   **dict(zip(head[axes:], line[axes:], strict=True))}, PredictionRow,
                  f"{path}, line {number}", remedy) for number, line in enumerate(lines, 2)]
