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
import functools
import shlex
import sys
from pathlib import Path

from megatron_spdf import exit_codes
from megatron_spdf.command_line import hear_interrupts, make_parser, print_words, refusing, say
from megatron_spdf.files import require_directory, write_json
from megatron_spdf.recipe.finetune import Finetune, load_finetune
from megatron_spdf.recipe.words import add_overrides, first_given, overruled_by
from megatron_spdf.runs.grid import Trial, command, ends_grid, require_launch, run_all
from megatron_spdf.runs.selection import render, result_of, select, trials
from megatron_spdf.text import counted


@refusing
def main() -> int:
    options = parse_arguments()
    finetune = load_finetune(options.recipe, options.overrides)
    chosen = trials(finetune)
    if not (options.print or options.words or options.select):
        require_launch(options.launch)
    if both := first_given(options.overrides, finetune.sweep):
        raise ValueError(f"{both}: every run of the sweep has a value of its own; leave this word "
                         f"out, or change its values with 'sweep={{{both}: [...]}}'")
    for trial in chosen:  # every combination is checked before the first runs
        load_finetune(options.recipe, [*options.overrides, *trial.words])
    if options.index is not None:
        if not 0 <= options.index < len(chosen):
            raise ValueError(f"--index {options.index}: the sweep has "
                             f"{counted(len(chosen), 'run')}, 0 to {len(chosen) - 1} "
                             f"(sbatch --array=0-{len(chosen) - 1})")
        chosen = [chosen[options.index]]
    if options.words:
        print_words(word for trial in chosen
                    for word in overruled_by(options.overrides, trial.words))
        return exit_codes.FINISHED
    if options.print:
        print("\n".join(map(shlex.join, commands(options, chosen).values())))
        return exit_codes.FINISHED
    left = [] if options.select else left_of(chosen)
    if options.index is None:  # else the run says it at once
        check_ahead(options, left)
    codes = run_all(commands(options, left))
    if options.index is not None:
        return codes[0] if codes else exit_codes.FINISHED
    return ends_grid(codes) or report(finetune)


def commands(options: argparse.Namespace, chosen: list[Trial]) -> dict[Path, list[str]]:
    return {trial.output: command(options.launch, "finetune.py", options.recipe, options.overrides,
                                  trial) for trial in chosen}


def check_ahead(options: argparse.Namespace, left: list[Trial]) -> None:
    """Raises a ValueError where finetune.py would refuse a run for what its start or its data are,
    before the first trains."""
    if not left:
        return
    from megatron_spdf.convert.source import open_weights  # imports PyTorch
    from megatron_spdf.training.finetune_setup import check_rules

    open_once = functools.cache(functools.partial(open_weights, checksums=False))
    for trial in left:
        finetune = load_finetune(options.recipe, [*options.overrides, *trial.words])
        try:
            check_rules(finetune, open_once(finetune.checkpoint))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{trial.output}: {error}") from None


def left_of(chosen: list[Trial]) -> list[Trial]:
    """The runs that are not done yet."""
    done = [trial for trial in chosen if result_of(trial)["done"]]
    for trial in done:
        say(f"done before: {trial.output}")
    return [trial for trial in chosen if trial not in done]


def report(finetune: Finetune) -> int:
    """Writes and shows the choice among the runs that are done."""
    selection = select([result_of(trial) for trial in trials(finetune)])
    path = Path(finetune.output) / "selection.json"
    require_directory(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, selection)
    print(render(selection))
    if selection["selected"] is None:
        print("error: no run of the sweep is done, so none can be selected", file=sys.stderr)
        return exit_codes.GUARD_STOPPED
    say(f"selected {selection['selected']['output']}, {selection['unfinished']} unfinished; "
          f"{path}")
    return exit_codes.FINISHED


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("recipe", help="fine-tuning recipe with sweep:, see configs/finetune")
    add_overrides(parser)
    parser.add_argument("--launch", default="",
                        help="what starts finetune.py; default: this Python, one process")
    parser.add_argument("--index", type=int, metavar="N",
                        help="the Nth combination only, counted from 0")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true",
                      help="print the commands, one a line, and run nothing")
    mode.add_argument("--words", action="store_true",
                      help="print the overrides of the combination for a script, a NUL before them "
                           "and after each, and run nothing")
    mode.add_argument("--select", action="store_true",
                      help="run nothing, select among the runs that are done")
    options = parser.parse_intermixed_args()
    if options.index is None if options.words else options.index is not None and options.select:
        parser.error("--words goes with --index, and --select without")
    return options


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
