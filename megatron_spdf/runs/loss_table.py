"""Table of final losses: one row for every finished run of a grid, small enough to be kept beside
the code, so that a law can be fitted again without the runs.

    size,length,masks,algorithm,sparsity,weights,...,loss,standard_error,held_out

First the labels of the grid's axes, then the columns of `LossRow`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from megatron_spdf.files import write_file
from megatron_spdf.records.values import typed
from megatron_spdf.runs.budget import active_weights, average_weights, linear_weights
from megatron_spdf.runs.experiment import Cell, Experiment
from megatron_spdf.scaling_law.points import Point
from megatron_spdf.schedule.stages import mean_flops, stages_of
from megatron_spdf.section import Section
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import read_csv

Positive = Annotated[float, Field(gt=0.0)]


class LossRow(Section):
    """A finished run.

    Attributes:
        labels: axis -> label of the grid.
        algorithm, sparsity: of its masks at the end; the sparsity is of all linear weights.
        weights, active_weights, average_weights: linear weights; those that are not zero at the
            end, and on average over the tokens.
        flops: of the training, active weights only.
        cell: what runs of several lengths have in common, the seed included.
        loss, standard_error: nats per token of the validation data, the error by the spread over
            batches; all runs of a grid see the same batches, so that differences are surer.
        held_out: no law is fitted to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: dict[str, str]
    algorithm: str
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)]
    weights: Positive
    active_weights: Positive
    average_weights: Positive
    tokens: Positive
    flops: Positive
    seed: int
    cell: str
    loss: Positive
    standard_error: Annotated[float, Field(ge=0.0)] | None
    held_out: bool

    @property
    def point(self) -> Point:
        """As a law sees it."""
        name = ",".join([*map("=".join, self.labels.items()), f"seed={self.seed}"])
        return Point(self.sparsity, self.active_weights, self.tokens, self.loss, name,
                     self.average_weights, self.algorithm, self.cell)


COLUMNS = [name for name in LossRow.model_fields if name != "labels"]


def rows_of(cells: Iterable[Cell], experiment: Experiment) -> list[LossRow]:
    """A row for every run of the cells that has a loss at its end."""
    return [_row(cell, seed, experiment, ended) for cell in cells for seed in cell.trials
            if (ended := cell.ended(seed))]


def _row(cell: Cell, seed: int, experiment: Experiment, ended: Mapping) -> LossRow:
    recipe = cell.recipes[seed]
    stages, weights = stages_of(recipe), linear_weights(recipe)
    tokens, active = sum(stage.tokens for stage in stages), active_weights(recipe)
    plan = Plan.of(recipe)
    return LossRow(
        labels=cell.labels, algorithm=recipe.sparsity.algorithm if plan.weights else "dense",
        sparsity=1.0 - active / weights, weights=weights, active_weights=active,
        average_weights=average_weights(recipe), tokens=tokens,
        flops=mean_flops(stages).total * tokens, seed=seed, cell=_cell(cell, seed),
        loss=ended["loss"], standard_error=ended.get("standard_error"),
        held_out=any(held.items() <= cell.labels.items() for held in experiment.hold_out))


def _cell(cell: Cell, seed: int) -> str:
    """Model, sparsity and seed: what is correlated among runs of several lengths."""
    recipe = cell.recipes[seed]
    m, s = recipe.model, recipe.sparsity
    return (f"{m.layers}x{m.hidden} {s.algorithm} {Plan.of(recipe).sparsity:.4f} seed {seed}")


def render_table(rows: Sequence[LossRow]) -> str:
    """The table as text with commas, floats to the last digit."""
    axes = list(dict.fromkeys(axis for row in rows for axis in row.labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, *COLUMNS])
    for row in rows:
        values = row.model_dump()
        writer.writerow([*(row.labels.get(axis, "") for axis in axes),
                         *(_text(values[column]) for column in COLUMNS)])
    return text.getvalue()


def _text(value: float | int | str | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def write_table(path: Path, rows: Sequence[LossRow]) -> None:
    """Writes the table of the rows; without a row, none."""
    if rows:
        write_file(path, render_table(rows))


def read_table(path: Path) -> list[LossRow]:
    """Reads a table.

    Raises:
        ValueError: a column is missing or twice there, or a value is no such number.
    """
    remedy = "write it again with tools/experiment.py GRID --report"
    head, *lines = read_csv(path, "losses", remedy)
    axes = head[:-len(COLUMNS)]
    if head[len(axes):] != COLUMNS or len(set(axes)) < len(axes):
        raise ValueError(f"{path} is no table of losses: its last columns must be "
                         f"{', '.join(COLUMNS)}, with each axis once before them; {remedy}")
    return [_read(line, axes, f"{path}, line {number}", remedy)
            for number, line in enumerate(lines, 2)]


def _read(line: list[str], axes: list[str], place: str, remedy: str) -> LossRow:
    """Reads a row by the places of its values: an axis may have the name of a column."""
    values = dict(zip(COLUMNS, line[len(axes):], strict=True))
    values["standard_error"] = values["standard_error"] or None
    return typed({"labels": dict(zip(axes, line, strict=False)), **values}, LossRow, place, remedy)
