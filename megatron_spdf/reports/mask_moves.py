"""What became of the masks of runs that move them: over the steps, and by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_spdf.reports.charts import Course, Scale, line_chart, mean_line
from megatron_spdf.reports.document import (
    details,
    escape,
    figure,
    heading,
    key,
    legend,
    paragraph,
    plots,
)
from megatron_spdf.reports.pens import Pen
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.seeds import SameRecipe
from megatron_spdf.runs.measured import Seen
from megatron_spdf.tables import Column, Html, Table
from megatron_spdf.text import counted

MOST_LAYERS = 10_000  # none are averaged
UNFOLDED = 4  # runs up to which the tables by layer are unfolded


@dataclass(frozen=True)
class Figure:
    """What a record says of a move.

    Attributes:
        name: of its field.
        unit: of a value, on an axis.
        scale: what values are multiplied by.
        by_layer: title of its plot by layer; empty: layers have no such figure.
        last: whether a layer shows the last value, or the mean over all moves.
    """

    name: str
    title: str
    unit: str
    scale: float = 1.0
    by_layer: str = ""
    last: bool = True


FIGURES = (
    Figure("share", "Active entries that move", "moved (%)", 100.0,
           "Moved by layer, mean of all moves", last=False),
    Figure("overlap", "Overlap with the first mask", "as at first (%)", 100.0,
           "Overlap by layer, after the last move"),
    Figure("age", "Mean age of active entries", "age (moves)", 1.0,
           "Mean age by layer, after the last move"),
    Figure("moved", "Number of entries that move", "entries moved"))


def moves_section(groups: Sequence[SameRecipe], pens: Mapping[Path, Pen]) -> list[str]:
    """Section of a page; nothing where no masks have moved."""
    moving = [group for group in groups if any(run.moves for run in group.runs)]
    if not moving:
        return []
    runs = [run for group in moving for run in group.runs if run.moves]
    figures = [drawn for chosen in FIGURES for drawn in _plots(moving, pens, chosen)]
    note = ("Of the active entries of all sparse weights, at each move. The first mask is that of "
            "the beginning of the run, or of its stage; what has died may have been born again. "
            "An age counts moves since an entry was born, or since that beginning. A dash: the "
            "algorithm or the recipe keeps no such figure.")
    tables = "".join(map(_by_layer, runs))
    return [heading("Masks that move", name="masks"), _of_runs(runs, pens),
            legend({group.label: pens[group.runs[0].directory] for group in moving}),
            plots(figures), paragraph(note, "note"),
            details("Tables by layer", tables, len(runs) <= UNFOLDED) if tables else ""]


def _plots(groups: Sequence[SameRecipe], pens: Mapping[Path, Pen], of: Figure) -> list[str]:
    """The figure over the steps, and by layer, of the runs that have it."""
    over, layers = [], []
    for group in groups:
        name, pen = group.label, pens[group.runs[0].directory]
        over.append(mean_line(name, pen, [{r["step"]: (r["step"], of.scale * r[of.name])
                                           for r in run.moves if of.name in r}
                                          for run in group.runs]))
        layers.append(mean_line(name, pen, [_values(run, of) for run in group.runs if run.moves],
                                most=MOST_LAYERS))
    ruled = Scale(from_zero=True, plain_x=True)
    made = []
    if any(line.x for line in over):
        made.append(figure(of.title, line_chart(over, "step", of.unit, f"Masks: {of.title}",
                                                ruled)))
    if of.by_layer and any(len(line.x) > 1 for line in layers):
        made.append(figure(of.by_layer, line_chart(layers, "layer", of.unit,
                                                   f"Masks: {of.by_layer}",
                                                   replace(ruled, whole_x=True))))
    return made


def _values(run: Logged, of: Figure) -> Course:
    """Value of a figure of each layer that has it."""
    found = {int(layer): [seen[of.name] for seen in every if of.name in seen]
             for layer, every in _layers(run).items() if layer.isdecimal()}
    return {layer: (layer, of.scale * (values[-1] if of.last else mean(values)))
            for layer, values in found.items() if values}


def _layers(run: Logged) -> dict[str, list[Seen]]:
    """Layers of the last move -> what each move that has them did."""
    return {layer: [record["layers"][layer] for record in run.moves
                    if layer in record.get("layers", {})]
            for layer in run.moves[-1].get("layers", {})}


def _columns() -> list[Column]:
    """Columns of records (all moves, the last) of a run or a layer."""
    def last(name: str) -> Callable[[Any], float | None]:
        return lambda row: row[1][-1].get(name)

    return [Column("moved, in the mean of all moves",
                   lambda row: mean(record["share"] for record in row[1]), ".3%"),
            Column("moved, in the last", last("share"), ".3%"),
            Column("as at first", last("overlap"), ".2%"),
            Column("mean age (moves)", last("age"), ".2f")]


def _of_runs(runs: Sequence[Logged], pens: Mapping[Path, Pen]) -> str:
    """Table with a row for each run."""
    def total(name: str) -> Callable[[Any], float | None]:
        return lambda row: sum(found) if (found := [
            record[name] for record in row[1] if name in record]) else None

    columns = [Column("run", lambda row: Html(key(pens[row[0].directory]) + escape(row[0].label)),
                      wraps=True),
               Column("algorithm", lambda row: row[1][-1]["algorithm"]),
               Column("moves", lambda row: len(row[1]), ","),
               Column("last at step", lambda row: row[1][-1]["step"], ","),
               Column("entries moved in all", total("moved"), ","), *_columns(),
               Column("time (s)", total("seconds"), ",.2f")]
    return Table(columns, [(run, run.moves) for run in runs]).html()


def _by_layer(run: Logged) -> str:
    """Table of a run's layers, below one of all of them."""
    layers = _layers(run)
    if not layers:
        return ""
    last = run.moves[-1]
    title = (f"{run.label}: {last['algorithm']}, {counted(len(run.moves), 'move')}, the last at "
             f"step {last['step']:,}")
    columns = [Column("layer", lambda row: row[0]), *_columns()]
    return heading(title, 3) + Table(columns, [("all", run.moves), *layers.items()]).html()
