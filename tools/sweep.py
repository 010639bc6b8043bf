#!/usr/bin/env python3
"""Runs the combinations that a fine-tuning recipe's `sweep:` lists, and selects one by validation
loss.

    python tools/sweep.py configs/finetune/e2e.yaml checkpoint=runs/gpt2_small_s75
    python tools/sweep.py RECIPE checkpoint=RUN --launch "torchrun --nproc-per-node 8"
    python tools/sweep.py RECIPE checkpoint=RUN --print          # one command a line
    python tools/sweep.py RECIPE checkpoint=RUN --index $SLURM_ARRAY_TASK_ID --launch "srun python"
    python tools/sweep.py RECIPE checkpoint=RUN --select         # after the array

A run that is done is skipped, one that was stopped goes on. The choice among those done is written
to selection.json in the recipe's output directory. Exit code 0; 2 for what the user can put right;
75 if a run was stopped on a signal; 3 if no run came to its end.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_spdf import exit_codes
from megatron_spdf.recipe.finetune import Finetune, load_finetune
from megatron_spdf.runs.sweep import Trial, render, result_of, select, trials, write_selection

FINETUNE = Path(__file__).resolve().parent.parent / "finetune.py"


def main() -> int:
    options = parse_arguments()
    try:
        finetune = load_finetune(options.recipe, options.overrides)
        chosen = trials(finetune)
        for trial in chosen:  # every combination is checked before the first runs
            load_finetune(options.recipe, [*options.overrides, *trial.words])
        if options.index is not None:
            if not 0 <= options.index < len(chosen):
                raise ValueError(f"--index {options.index}: the sweep has {len(chosen)} runs, 0 to "
                                 f"{len(chosen) - 1}")
            chosen = [chosen[options.index]]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    if options.print:
        print("\n".join(shlex.join(command(options, trial)) for trial in chosen))
        return exit_codes.FINISHED
    for trial in [] if options.select else chosen:
        code = run(options, trial)
        if code in (exit_codes.BAD_INPUT,
                    exit_codes.STOPPED_ON_SIGNAL) or options.index is not None:
            return code
    return report(finetune)


def command(options: argparse.Namespace, trial: Trial) -> list[str]:
    """The command line of a trial."""
    return [*shlex.split(options.launch or sys.executable), str(FINETUNE),
            options.recipe, *options.overrides, *trial.words]


def run(options: argparse.Namespace, trial: Trial) -> int:
    """Runs a trial that is not done yet; returns its exit code."""
    if result_of(trial).done:
        print(f"done before: {trial.output}", flush=True)
        return exit_codes.FINISHED
    words = command(options, trial)
    print(f"$ {shlex.join(words)}", flush=True)
    code = subprocess.run(words, check=False).returncode
    if code:
        print(f"{trial.output} ended with exit code {code}", file=sys.stderr, flush=True)
    return code


def report(finetune: Finetune) -> int:
    """Writes and shows the choice among the runs that are done."""
    selection = select(finetune)
    path = write_selection(finetune, selection)
    print(render(selection))
    if selection["selected"] is None:
        print("error: no run of the sweep is done, so none can be selected", file=sys.stderr)
        return exit_codes.GUARD_STOPPED
    print(f"selected {selection['selected']['output']}, {selection['unfinished']} unfinished; "
          f"{path}")
    return exit_codes.FINISHED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("recipe", help="fine-tuning recipe with sweep:, see configs/finetune")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                        help="values that win over the recipe's")
    parser.add_argument("--launch", default="",
                        help="what starts finetune.py; default: this Python, one process")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true",
                      help="print the commands, one a line, and run nothing")
    mode.add_argument("--index", type=int, metavar="N",
                      help="run the Nth combination only, counted from 0")
    mode.add_argument("--select", action="store_true",
                      help="run nothing, select among the runs that are done")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
