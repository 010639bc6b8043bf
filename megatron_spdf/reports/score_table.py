"""Scores of the fine-tuned runs of a grid: a table for each run, small enough to be kept beside the
code, and what it says, means and intervals over seeds.

    masks,fine_tuning,seed,pretraining_flops,fine_tuning_flops,...,BLEU,NIST

First the labels, then the columns of `ScoreRow`, then the metrics.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

from pydantic import ConfigDict, Field

from megatron_spdf.files import write_file
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.records.values import typed
from megatron_spdf.reports.runs import Evaluation, read_all
from megatron_spdf.runs.downstream import Tuned
from megatron_spdf.runs.experiment import summary
from megatron_spdf.section import Section
from megatron_spdf.tables import Column, Table, read_csv

ANEW = "write it anew with tools/evaluate.py"
Positive = Annotated[float, Field(gt=0.0)]


class ScoreRow(Section):
    """A fine-tuned run with its scores.

    Attributes:
        labels: axis -> label, of the grid and of the fine-tuning.
        pretraining_flops, fine_tuning_flops: of active weights.
        pretraining_loss: nats per token at the end.
        fine_tuning_loss: lowest of the evaluations, whose checkpoint is scored.
        scores: metric -> value; None: it could not be computed here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: dict[str, str]
    seed: int
    pretraining_flops: Positive
    fine_tuning_flops: Positive
    pretraining_loss: Positive
    fine_tuning_loss: Positive
    scores: dict[str, float | None]


COLUMNS = [name for name in ScoreRow.model_fields if name not in ("labels", "scores")]


def score_rows(tuned: Iterable[Tuned]) -> list[ScoreRow]:
    """A row for every run that is fine-tuned and scored."""
    found = []
    for each in tuned:
        if not (each.done and each.scored):
            continue
        before, after = read_all([each.start, each.trial.output])
        scores = read_json(each.scores / "scores.json", Evaluation, constants=True,
                           remedy=ANEW)["scores"]["all"]
        found.append(ScoreRow(
            labels=each.labels, seed=each.seed, pretraining_flops=before.flops,
            fine_tuning_flops=after.flops, pretraining_loss=before.valid[-1]["loss"],
            fine_tuning_loss=min(record["loss"] for record in after.valid), scores=scores))
    return found


def write_scores(path: Path, rows: Sequence[ScoreRow]) -> None:
    """Writes the table of the rows, floats to the last digit; without a row, none."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    axes, metrics = _names(rows, "labels"), _names(rows, "scores")
    writer.writerow([*axes, *COLUMNS, *metrics])
    for row in rows:
        writer.writerow([*(row.labels[axis] for axis in axes),
                         *(getattr(row, column) for column in COLUMNS),
                         *(row.scores.get(metric) for metric in metrics)])
    write_file(path, text.getvalue())


def read_scores(path: Path) -> list[ScoreRow]:
    """Reads a table.

    Raises:
        ValueError: a column is missing, or a value is no such number.
    """
    remedy = "write it again with tools/experiment.py GRID --report"
    head, *lines = read_csv(path, "scores", remedy)
    if missing := [column for column in COLUMNS if head.count(column) != 1]:
        raise ValueError(f"{path} is no table of scores: it has not {missing[0]} once; {remedy}")
    first, last = head.index(COLUMNS[0]), head.index(COLUMNS[-1]) + 1
    found = []
    for number, line in enumerate(lines, 2):
        place = f"{path}, line {number}"
        values = dict(zip(head, line, strict=True))
        found.append(typed({
            "labels": {name: values[name] for name in head[:first]},
            **{name: values[name] for name in head[first:last]},
            "scores": {name: values[name] or None for name in head[last:]}}, ScoreRow, place,
            remedy))
    return found


def render_scores(rows: Sequence[ScoreRow], order: Sequence[Mapping[str, str]]) -> str:
    """Markdown: means and intervals over seeds, and differences between neighbors of an order, seed
    by seed.

    Args:
        order: axis -> label, which pick the rows of a place.
    """
    cells: dict[tuple[str, ...], list[ScoreRow]] = {}
    for row in rows:
        cells.setdefault(tuple(row.labels.values()), []).append(row)
    columns = [*(Column(axis, lambda cell, axis=axis: cell[0].labels[axis])
                 for axis in _names(rows, "labels")),
               Column("FLOPs, both", lambda cell: mean(
                   row.pretraining_flops + row.fine_tuning_flops for row in cell), ".4g"),
               Column("pre-training loss", lambda cell: _with_interval(
                   [row.pretraining_loss for row in cell]), align="right"),
               *(Column(metric, lambda cell, metric=metric: _with_interval(
                   [row.scores.get(metric) for row in cell]), align="right")
                 for metric in _names(rows, "scores")),
               Column("seeds", len, "d")]
    said = ("Means over seeds of pre-training and fine-tuning, and 95% confidence intervals "
            "(Student's t).")
    parts = [Table(columns, list(cells.values())).markdown(), said]
    if compared := _compared(rows, order):
        parts += [compared, "Differences of the same seeds, likewise; an interval that holds 0 "
                            "decides nothing."]
    return "\n\n".join(parts) + "\n"


def _compared(rows: Sequence[ScoreRow], order: Sequence[Mapping[str, str]]) -> str:
    """Table of the differences; empty where no neighbors have a seed in common."""
    places = [{row.seed: row for row in rows if place.items() <= row.labels.items()}
              for place in order]
    pairs = [(f"{', '.join(order[i].values())}, less {', '.join(order[i + 1].values())}",
              [(places[i][seed], places[i + 1][seed]) for seed in places[i]
               if seed in places[i + 1]])
             for i in range(len(order) - 1)]
    metrics = _names(rows, "scores")
    columns = [Column("difference", lambda pair: pair[0]),
               *(Column(metric, lambda pair, metric=metric: _difference(pair[1], metric),
                        align="right") for metric in metrics),
               Column("seeds", lambda pair: len(pair[1]), "d")]
    shown = [pair for pair in pairs if pair[1]]
    return Table(columns, shown).markdown() if shown else ""


def _difference(pairs: Sequence[tuple[ScoreRow, ScoreRow]], metric: str) -> str | None:
    values = [(one.scores.get(metric), other.scores.get(metric)) for one, other in pairs]
    return _with_interval([None if None in pair else pair[0] - pair[1] for pair in values], "+")


def _with_interval(values: Sequence[float | None], sign: str = "") -> str | None:
    center, interval = summary([value for value in values if value is not None])
    if center is None:
        return None
    return f"{center:{sign}.4f}" + ("" if interval is None else f" ± {interval:.4f}")


def _names(rows: Sequence[ScoreRow], part: str) -> list[str]:
    """Keys of a part of the rows, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in getattr(row, part)))
