#!/usr/bin/env python3
"""Draws up what a grid says of the scaling law, from tables of losses that lie beside the page.

    python tools/experiment.py configs/experiments/scaling_law.yaml --report
    python tools/law_page.py predict configs/experiments/scaling_law.yaml LOSSES.csv
    git commit docs/results/scaling_law_predictions.csv
    python tools/law_page.py page configs/experiments/scaling_law.yaml LOSSES.csv

LOSSES.csv is losses.csv of the grid's results. `predict` writes the losses that the law of all
other cells gives those that the grid holds out, and reads none of theirs; predictions of cells
whose losses are published already stay as they are. `page` publishes the table, without held-out
cells that were not predicted, fits every form of the law, draws the figure and writes the tables
between `<!-- NAME -->` and `<!-- end of NAME -->` of README.md, NAME being that of the grid's file;
without LOSSES.csv it does so with the table that is published. Exit code 0, or 2 for what the user
can put right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.marked_page import place_on
from experiment import write_into

from megatron_spdf import exit_codes
from megatron_spdf.command_line import hear_interrupts, make_parser, positive, refusing, say
from megatron_spdf.files import write_file
from megatron_spdf.records.json_writer import to_json
from megatron_spdf.reports.frontiers import plot_frontiers
from megatron_spdf.reports.law_tables import (
    coefficients_table,
    difference_table,
    gains_table,
    held_out_table,
    progress_table,
)
from megatron_spdf.runs.experiment import Cell, Experiment, cells, load_experiment
from megatron_spdf.runs.held_out import (
    PredictionRow,
    labels_of,
    merged,
    of_form,
    predict,
    read_predictions,
    write_predictions,
)
from megatron_spdf.runs.loss_table import LossRow, read_table, write_table
from megatron_spdf.scaling_law.fit import fit_law, shortcomings
from megatron_spdf.scaling_law.forms import FORMS

FIGURE = "loss_against_flops"


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    experiment = load_experiment(options.grid)
    if not (experiment.plot.frontiers and experiment.plot.panels):
        raise ValueError(f"{options.grid} has no plot.frontiers or no plot.panels, which the "
                         "figure and the tables go by; name them")
    if not options.into.is_dir():
        raise ValueError(f"--into {options.into} is no directory; make it, or name the page's")
    grid = cells(experiment, options.grid, [])
    return options.command(options, experiment, grid)


def write_predicted(options: argparse.Namespace, experiment: Experiment, grid: list[Cell]) -> int:
    """Writes predictions of the held-out cells that are not published."""
    table, path = _place(options, ".csv"), _place(options, "_predictions.csv")
    published = {labels_of(row) for row in read_table(table)} if table.is_file() else set()
    rows = _rows(options.losses, grid)
    now = predict(grid, experiment, rows, options.starts, options.bootstrap)
    if not now:
        raise ValueError(f"the runs of {options.losses} determine no form of the law; wait for "
                         "more")
    write_predictions(path, merged(read_predictions(path), now, published))
    say(f"wrote {path}; commit it before the losses are looked at")
    return exit_codes.FINISHED


def write_page(options: argparse.Namespace, experiment: Experiment, grid: list[Cell]) -> int:
    """Publishes a table of losses, and draws the figure and the tables of the page."""
    place_on(options.into / "README.md", options.grid.stem)  # before the fits, which take minutes
    predictions = read_predictions(_place(options, "_predictions.csv"))
    table = _place(options, ".csv")
    rows = _rows(options.losses or table, grid)
    known = {labels_of(row) for row in predictions}
    unknown = {labels_of(row) for row in rows if row.held_out} - known
    for labels in sorted(unknown):
        say(f"{', '.join('='.join(pair) for pair in labels)} is held out and not predicted, and "
            "is left out; predict it first", sys.stderr)
    rows = [row for row in rows if labels_of(row) not in unknown]
    write_table(table, rows)
    fits = fitted(rows, options)
    write_file(_place(options, "_fit.json"), to_json(fits, indent=1) + "\n")
    for dark in (False, True):
        plot_frontiers(rows, experiment.plot, options.into / f"{FIGURE}{'_dark' * dark}.png", dark)
    text = render(experiment, grid, rows, predictions, fits)
    write_into(options.into / "README.md", options.grid.stem, text)
    say(text)
    return exit_codes.FINISHED


def fitted(rows: Sequence[LossRow], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every form of the law that the runs determine, fitted to those that are not held out."""
    points, found = [row.point for row in rows if not row.held_out], []
    for name, form in FORMS.items():
        own = of_form(points, name)
        if missing := shortcomings(own, form):
            say(f"the form {name} is left out: {'; '.join(missing)}", sys.stderr)
            continue
        fit = fit_law(own, options.starts, options.bootstrap, form=form)
        plain = {key: value for key, value in fit.as_plain().items() if key != "predictions"}
        found.append({**plain, "runs": len(own)})
    return found


def render(experiment: Experiment, grid: Sequence[Cell], rows: Sequence[LossRow],
           predictions: Sequence[PredictionRow], fits: Sequence[dict[str, Any]]) -> str:
    """The tables of the page."""
    plot = experiment.plot
    first, *others = plot.frontiers
    parts = ["### How much of the grid this is", progress_table(grid, rows, plot)]
    if fits:
        parts += ["### Equivalent dense size", gains_table(fits), "### The laws",
                  *(f"- {fit['form']}: {FORMS[fit['form']].title}" for fit in fits),
                  coefficients_table(fits)]
    parts += ["### Held-out cells", held_out_table(predictions, rows), "### Mask against mask",
              *(difference_table(rows, plot, mask, first) for mask in others),
              *(difference_table(rows, plot, mask, other)
                for other, mask in zip(others, others[1:], strict=False))]
    return "\n\n".join(parts) + "\n"


def _rows(path: Path, grid: Sequence[Cell]) -> list[LossRow]:
    """The table of a grid.

    Raises:
        ValueError: it is that of a grid with other axes.
    """
    rows, axes = read_table(path), list(grid[0].labels)
    for row in rows:
        if set(row.labels) != set(axes):
            raise ValueError(f"{path} has the axes {', '.join(row.labels) or 'none'}, and the grid "
                             f"has {', '.join(axes)}; give losses.csv of this grid's results")
    return rows


def _place(options: argparse.Namespace, ending: str) -> Path:
    return options.into / f"{options.grid.stem}{ending}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="predict|page")
    for name, command, help_of in (
            ("predict", write_predicted, "predict held-out cells, looking at none"),
            ("page", write_page, "publish a table of losses, and draw up the page")):
        own = commands.add_parser(name, help=help_of)
        own.set_defaults(command=command)
        own.add_argument("grid", type=Path, help="a grid with hold_out and plot.frontiers")
        own.add_argument("losses", type=Path, nargs=None if name == "predict" else "?",
                         help="losses.csv of its results")
        own.add_argument("--into", type=Path, default=Path("docs/results"), metavar="DIR",
                         help="where page and tables lie (default: docs/results)")
        own.add_argument("--starts", type=positive, default=32, metavar="N",
                         help="random starting points of a fit (default: 32)")
        own.add_argument("--bootstrap", type=positive, default=200, metavar="N",
                         help="resamplings (default: 200)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
