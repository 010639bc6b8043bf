#!/usr/bin/env python3
"""Runs a grid of pre-training runs, and says what came out: mean loss and its interval over seeds.

    python tools/experiment.py configs/experiments/transfer.yaml            runs what is left
    python tools/experiment.py configs/experiments/transfer.yaml --jobs 2   two runs at a time
    python tools/experiment.py configs/experiments/comparison.yaml --only budget=flops
    python tools/experiment.py configs/experiments/transfer.yaml --print         one command a line
    python tools/experiment.py configs/experiments/transfer.yaml --report   reports what there is

Each run is pretrain.py's, in its own directory: one that is done is skipped, one that was stopped
goes on, so that the grid may be interrupted at any moment. OUTPUT/results.json, results.md and
results.png hold what is there so far. Exit code 0; 2 for what the user can put right; 75 if a run
was stopped on a signal; 3 if a run has no result.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_spdf import exit_codes
from megatron_spdf.files import write_json
from megatron_spdf.reports.experiment_plot import plot_results
from megatron_spdf.runs.experiment import (
    Experiment,
    load_experiment,
    loss_of,
    render,
    results,
    runs,
)
from megatron_spdf.runs.sweep import Trial

PRETRAIN = Path(__file__).resolve().parent.parent / "pretrain.py"


def main() -> int:
    options = parse_arguments()
    try:
        experiment = chosen(load_experiment(options.experiment), options.only)
        planned = list(runs(experiment, options.experiment, options.overrides))
        left = [] if options.report else [t for t, recipe in planned if loss_of(t, recipe) is None]
        if options.print:
            print("\n".join(shlex.join(command(options, experiment, trial)) for trial in left))
            return exit_codes.FINISHED
        print(f"{len(planned)} runs, {len(left)} to do", flush=True)
        stopped = run_all(options, experiment, left)
        return stopped or report(options, experiment)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT


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


def run_all(options: argparse.Namespace, experiment: Experiment, left: list[Trial]) -> int:
    """Runs what is left, as many at a time as asked for; a code to end with if a run says so, else
    0."""
    ends = []

    def run(trial: Trial) -> None:
        if ends:
            return
        words = command(options, experiment, trial)
        print(f"$ {shlex.join(words)}", flush=True)
        trial.output.parent.mkdir(parents=True, exist_ok=True)
        with trial.output.with_suffix(".txt").open("a") as log:
            code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False, env={
                "OMP_NUM_THREADS": "1", **os.environ} if options.jobs > 1 else None).returncode
        if code:
            print(f"{trial.output} ended with exit code {code}, see {log.name}", file=sys.stderr,
                  flush=True)
        if code in (exit_codes.BAD_INPUT, exit_codes.STOPPED_ON_SIGNAL):
            ends.append(code)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, left))
    return ends[0] if ends else 0


def command(options: argparse.Namespace, experiment: Experiment, trial: Trial) -> list[str]:
    """The command line of a run."""
    return [*shlex.split(options.launch or sys.executable), str(PRETRAIN),
            str(options.experiment.parent / experiment.recipe), *options.overrides, *trial.words]


def report(options: argparse.Namespace, experiment: Experiment) -> int:
    """Writes and shows the table, and draws it."""
    rows = results(experiment, options.experiment, options.overrides)
    output = Path(experiment.output)
    output.mkdir(parents=True, exist_ok=True)
    table = render(experiment, rows)
    write_json(output / "results.json", {"experiment": options.experiment.name, "cells": rows})
    (output / "results.md").write_text(table)
    plot_results(rows, experiment.plot.x, experiment.plot.lines, experiment.plot.panels,
                 output / "results.png")
    print(table)
    missing = sum(row["missing"] for row in rows)
    if missing:
        print(f"error: {missing} runs have no loss at their end: not begun, unfinished, or not "
              "finite", file=sys.stderr)
    return exit_codes.GUARD_STOPPED if missing and not options.report else exit_codes.FINISHED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("experiment", type=Path, help="a grid, see configs/experiments")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=LABEL",
                        help="may be repeated")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="runs at a time (default: 1)")
    parser.add_argument("--launch", default="",
                        help="what starts pretrain.py; default: this Python, one process")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true",
                      help="print the commands that are left, and run nothing")
    mode.add_argument("--report", action="store_true", help="run nothing, report what there is")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
