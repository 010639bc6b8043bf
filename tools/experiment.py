#!/usr/bin/env python3
"""Runs a grid of pre-training runs, and says what came out: mean loss and its interval over seeds.

    python tools/experiment.py configs/experiments/transfer.yaml            runs what is left
    python tools/experiment.py configs/experiments/transfer.yaml --jobs 2   two runs at a time
    python tools/experiment.py configs/experiments/comparison.yaml --only budget=flops
    python tools/experiment.py configs/experiments/one_card.yaml --minutes 9   stops then, and saves
    python tools/experiment.py configs/experiments/transfer.yaml --print         one command a line
    python tools/experiment.py configs/experiments/transfer.yaml --report   reports what there is
    python tools/experiment.py configs/experiments/fair_comparison.yaml --report --page PAGE.md
    python tools/experiment.py configs/experiments/fair_comparison.yaml --known tried.csv

Each run is pretrain.py's, in its own directory: one that is done is skipped, one that was stopped
goes on, so that the grid may be interrupted at any moment; with `--known TABLE` what that table has
a loss of is done too. OUTPUT/results.json, results.md and
results.png, with `plot.curves` curves.png and with `plot.frontiers` frontiers.png too, hold what is
there so far, and losses.csv the final losses, to which `tools/plan.py fit` fits a law. A grid with
`tune` is run in rounds, in which every cell is tuned, and then with all seeds
(megatron_spdf/runs/tuning.py); tried.csv has the losses of all that was tried. With `finetune`
every run is fine-tuned and scored too (megatron_spdf/runs/downstream.py), into scores.csv and
scores.md. Exit code 0; 2 for what the user can put right; 75 if a run was stopped on a signal; 3 if
a run has no result.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import circumstances
from benchmarks.marked_page import place_on, write_between

from megatron_spdf import exit_codes
from megatron_spdf.command_line import (
    hear_interrupts,
    make_parser,
    positive,
    positive_real,
    refusing,
    say,
)
from megatron_spdf.files import require_directory, write_file, write_json
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.words import add_overrides, overruled_by
from megatron_spdf.reports.experiment_plot import plot_results
from megatron_spdf.reports.frontiers import plot_frontiers
from megatron_spdf.reports.learning_curves import plot_curves
from megatron_spdf.reports.score_table import render_scores, score_rows, write_scores
from megatron_spdf.runs.downstream import Tuned, tunings
from megatron_spdf.runs.experiment import (
    Cell,
    Ended,
    Experiment,
    cells,
    load_experiment,
    nothing_known,
    render,
    results,
)
from megatron_spdf.runs.grid import Trial, command, ends_grid, require_launch, run_all
from megatron_spdf.runs.known import Known
from megatron_spdf.runs.loss_table import rows_of, write_table
from megatron_spdf.runs.paired import difference_column, with_differences
from megatron_spdf.runs.trunks import Run, with_trunks
from megatron_spdf.runs.tuning import render_neighbors, tuned_cells
from megatron_spdf.text import counted

LOSSES, TRIED = "losses.csv", "tried.csv"


@refusing
def main() -> int:
    options = parse_arguments()
    experiment = chosen(load_experiment(options.experiment), options.only)
    if not (options.print or options.report):
        require_launch(options.launch)
    if options.page:
        place_on(options.page, options.experiment.stem)
        if experiment.finetune:
            place_on(options.page, f"scores of {options.experiment.stem}")
    if options.known and experiment.finetune:
        raise ValueError(f"--known {options.known[0]}: fine-tuning begins with the checkpoints of "
                         "the runs, which a table does not have; leave it out")
    known = Known(options.known) if options.known else nothing_known
    if experiment.tune:
        return tune(experiment, options, known)
    grid = cells(experiment, options.experiment, options.overrides, known)
    # one seed of all cells after the other, so that an interrupted grid is even
    planned = [(cell.trials[seed], cell.recipes[seed]) for seed in experiment.seeds
               for cell in grid]
    runs = {run.trial.output: run for chain in with_trunks(planned) for run in chain}
    after = fine_tunings(grid, experiment, options)
    left = [] if options.report else [cell.trials[seed] for seed in experiment.seeds
                                      for cell in grid if cell.loss(seed) is None]
    commands = commands_of(left, experiment, options, runs)
    later = commands_after(after, experiment, options)
    both = commands | {output: words for own in later.values() for output, words in own.items()}
    if options.print:
        print("\n".join(map(shlex.join, both.values())))
        return exit_codes.FINISHED
    check_ahead([(trial, own) for trial, own in planned if trial.output in commands])
    more = counted(len(both) - len(commands), "fine-tuning or evaluation",
                   "fine-tunings and evaluations")
    print(f"{counted(len(planned), 'run')}, {len(commands)} to do"
          + (f", and {more}" if len(both) > len(commands) else ""), flush=True)
    chains: dict[Path, list[Path]] = {}
    for output in runs:  # a trunk comes before its branches
        own = [*([output] if output in commands else []), *later.get(output, {})]
        chains.setdefault(runs[output].trunk or output, []).extend(own)
    ready = {path: check for each in after for path, check in (
        (each.trial.output, each.may_begin), (each.scores, each.may_be_scored))}

    def prepare(output: Path) -> bool:
        return runs[output].prepare() if output in runs else ready[output]()

    codes = run_all(both, options.jobs, list(chains.values()), prepare, options.until)
    return ends_grid(codes) or max(report(grid, results(grid), experiment, options),
                                   report_scores(after, experiment, options))


def check_ahead(planned: list[tuple[Trial, Recipe]]) -> None:
    """Raises a ValueError where pretrain.py would refuse a run for what its data or its teacher
    are, before the first trains."""
    from megatron_spdf.data.pretraining.corpus import check_corpus  # imports PyTorch
    from megatron_spdf.training.teacher import Teacher

    seen = set()
    for trial, recipe in planned:
        model = recipe.model.shape() if recipe.distill.on else recipe.model.vocab_size
        inputs = repr((recipe.data, recipe.distill, model, recipe.train.sequence_length,
                       recipe.train.global_batch))
        # loader processes need memory of the machine that the run is launched on, maybe another
        data = recipe.data.model_copy(update={"workers": 0})
        try:
            if inputs not in seen:
                Teacher(recipe, check_corpus(recipe.model_copy(update={"data": data})).tokenizer)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{trial.output}: {error}") from None
        seen.add(inputs)


def fine_tunings(grid: list[Cell], experiment: Experiment,
                 options: argparse.Namespace) -> list[Tuned]:
    """The fine-tuning runs of the grid, if its file asks for them. Those that are to be run are
    checked, as nobody wants to know after the pre-training what was wrong with them."""
    if experiment.finetune is None:
        return []
    found = [(tuned, cell.recipes[tuned.seed]) for cell in grid for tuned in tunings(
        experiment.finetune, cell.labels,
        {seed: trial.output for seed, trial in cell.trials.items()}, options.experiment.parent)]
    for tuned, recipe in [] if options.report or options.print else found:
        if not tuned.done:
            tuned.check(recipe)
    return [tuned for tuned, _ in found]


def commands_after(after: list[Tuned], experiment: Experiment,
                   options: argparse.Namespace) -> dict[Path, dict[Path, list[str]]]:
    """Pre-training run -> run directory, or that of an evaluation -> command line."""
    found: dict[Path, dict[Path, list[str]]] = {}
    for each in [] if options.report else after:
        recipe = options.experiment.parent / experiment.finetune.recipe
        found.setdefault(each.start, {}).update(each.commands(recipe, options.launch))
    return found


def report_scores(after: list[Tuned], experiment: Experiment, options: argparse.Namespace) -> int:
    """Writes and shows the table of scores, if the grid has any."""
    rows = score_rows(after)
    if rows:
        output = Path(experiment.output)
        write_scores(output / "scores.csv", rows)
        table = render_scores(rows, experiment.finetune.order)
        write_file(output / "scores.md", table)
        say(table)
        if options.page:
            write_into(options.page, f"scores of {options.experiment.stem}", table)
    if missing := len(after) - len(rows):
        print(f"error: {missing} of {len(after)} fine-tuned runs have no scores", file=sys.stderr)
    return exit_codes.GUARD_STOPPED if missing and not options.report else exit_codes.FINISHED


def tune(experiment: Experiment, options: argparse.Namespace,
         known: Callable[[Cell], Ended]) -> int:
    """Runs what the searches of all cells ask for, round after round."""
    grid = tuned_cells(experiment, options.experiment, options.overrides, known)
    tried: set[Path] = set()
    while not options.report and (left := [trial for cell in grid for trial in cell.left(tried)]):
        commands = commands_of(left, experiment, options)
        if options.print:
            print("\n".join(map(shlex.join, commands.values())))
            return exit_codes.FINISHED
        check_ahead([(trial, point.recipes[seed]) for cell in grid for point in cell.seen
                     for seed, trial in point.trials.items() if trial in left])
        print(f"{counted(len(commands), 'run')} to do in this round", flush=True)
        if code := ends_grid(run_all(commands, options.jobs, until=options.until)):
            return code
        tried |= commands.keys()
    code = report([cell.best(tried) for cell in grid], [cell.result(tried) for cell in grid],
                  experiment, options)
    seen = [point for cell in grid for point in cell.seen]
    write_table(Path(experiment.output) / TRIED, rows_of(seen, experiment))
    return code


def commands_of(trials: list[Trial], experiment: Experiment, options: argparse.Namespace,
                runs: Mapping[Path, Run] | None = None) -> dict[Path, list[str]]:
    """Run directory -> command line.

    Args:
        runs: run directory -> the run, which may be a trunk.
    """
    recipe = options.experiment.parent / experiment.recipe
    return {trial.output: command(
        options.launch, "pretrain.py", recipe,
        overruled_by(options.overrides, runs[trial.output].words if runs else []), trial)
        for trial in trials}


def chosen(experiment: Experiment, only: list[str]) -> Experiment:
    """The experiment with the labels that were asked for, of the axes that were named."""
    axes = dict(experiment.axes)
    for name in {word.partition("=")[0] for word in only}:
        labels = {word.partition("=")[2] for word in only if word.partition("=")[0] == name}
        if name not in axes or not labels <= axes[name].keys():
            raise ValueError(f"--only {name}={','.join(sorted(labels))} names no cell; "
                             + (f"the labels are {', '.join(axes[name])}" if name in axes else
                                f"the axes are {', '.join(axes)}"))
        axes[name] = {label: values for label, values in axes[name].items() if label in labels}
    return experiment.model_copy(update={"axes": axes})


def report(grid: list[Cell], rows: list[dict[str, Any]], experiment: Experiment,
           options: argparse.Namespace) -> int:
    """Writes and shows the tables, and draws the first.

    Missing runs are no error where the user asked for what there is.

    Args:
        grid: cells, where they were tuned at the best point.
        rows: their results.
    """
    output = Path(experiment.output)
    require_directory(output)
    output.mkdir(parents=True, exist_ok=True)
    ended = rows_of(grid, experiment)
    write_table(output / LOSSES, ended)
    rows = with_differences(experiment, rows)
    shown = [row for row in rows if row["losses"]] or rows
    table = render(experiment, shown, difference_column(experiment))
    if experiment.tune:
        table += f"\n{render_neighbors(experiment, shown)}"
    if len(shown) < len(rows):
        table += f"\n{len(rows) - len(shown)} of {len(rows)} cells have no finished run yet.\n"
    write_json(output / "results.json", {"experiment": options.experiment.name, "cells": rows})
    write_file(output / "results.md", table)
    drawn = [{**row, "labels": {axis: row["labels"][axis] for axis in experiment.axes}}
             for row in rows]
    plot_results(drawn, experiment.plot.x, experiment.plot.lines, experiment.plot.panels,
                 output / "results.png")
    if experiment.plot.curves:
        plot_curves(grid, [*experiment.axes], experiment.plot.curves, output / "curves.png")
    if experiment.plot.frontiers:
        plot_frontiers(ended, experiment.plot, output / "frontiers.png")
    say(table)
    if options.page:
        write_into(options.page, options.experiment.stem, table)
    missing = sum(row["missing"] for row in rows)
    if missing:
        print(f"error: {counted(missing, 'run')} without a loss at the end: not begun, "
              "unfinished, or not finite", file=sys.stderr)
    return exit_codes.GUARD_STOPPED if missing and not options.report else exit_codes.FINISHED


def write_into(page: Path, name: str, table: str) -> None:
    """Replaces what stands on a page between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
        ValueError: the page has no such place.
    """
    measured = circumstances()
    versions = ", ".join(f"{key} {value}" for key, value in measured["versions"].items())
    about = f"Reported {measured['date'][:10]}; {measured['device']}; {versions}."
    write_between(page, name, f"{about}\n\n{table}")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("experiment", type=Path, help="a grid, see configs/experiments")
    add_overrides(parser, "for every run")
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=LABEL",
                        help="may be repeated")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N",
                        help="runs at a time (default: 1)")
    parser.add_argument("--launch", default="",
                        help="what starts pretrain.py; default: this Python, one process")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true",
                      help="print the commands that are left, and run nothing")
    mode.add_argument("--report", action="store_true", help="run nothing, report what there is")
    parser.add_argument("--page", type=Path, metavar="FILE",
                        help="also write the tables into this Markdown page, between <!-- NAME --> "
                             "and <!-- end of NAME -->, NAME being that of the grid's file")
    parser.add_argument("--known", type=Path, action="append", default=[], metavar="TABLE",
                        help="losses.csv or tried.csv of the same grid, from another machine or "
                             "docs/results: its runs are not made again; may be repeated")
    parser.add_argument("--minutes", type=positive_real, metavar="M",
                        help="after which what runs saves and ends, and nothing more is begun; the "
                             "same command goes on (default: no bound)")
    options = parser.parse_intermixed_args()
    options.until = time.monotonic() + 60 * (options.minutes or math.inf)
    return options


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
