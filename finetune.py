#!/usr/bin/env python3
"""Dense or sparse fine-tuning of a pre-trained decoder on contexts and completions.

    python finetune.py RECIPE.yaml checkpoint=RUN [section.key=value ...] [--dry-run]
    deepspeed --num_gpus 2 finetune.py configs/finetune/e2e.yaml checkpoint=RUN parallel.data=2
    torchrun --nproc-per-node 8 finetune.py configs/finetune/e2e.yaml checkpoint=RUN parallel.data=8
    srun python finetune.py configs/finetune/e2e.yaml checkpoint=RUN parallel.data=8

One process per GPU. A run goes on from the newest complete checkpoint in its output directory by
itself. Exit codes: 0 finished; 2 bad input; 3 stopped by a guard; 4 a rank is lost; 75 stopped on
SIGTERM or SIGUSR1, a checkpoint saved.
"""

from __future__ import annotations

import sys

from megatron_spdf import exit_codes
from megatron_spdf.command_line import hear_interrupts, print_words
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.finetuning.task import render_tasks
from megatron_spdf.recipe.finetune import Finetune, load_finetune
from megatron_spdf.recipe.load import render_recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.training.finetune_setup import prepare
from megatron_spdf.training.job import Job, open_run, parse_arguments, preflight, refusals, run_job


def main() -> int:
    """Checks everything that can be checked without a device, then trains."""
    with refusals():
        description = f"{__doc__}\ntasks:\n{render_tasks()}\n"
        options = parse_arguments(description, Finetune, "configs/finetune")
        ranks = find_ranks()
        finetune = load_finetune(options.recipe, options.overrides, ranks.world)
        if options.print_output:
            print_words([finetune.output])
            return exit_codes.FINISHED
        prepared = prepare(finetune, open_weights(finetune.checkpoint, checksums=False))
        if options.dry_run:
            print(f"{render_recipe(finetune)}\n{prepared.summary}")
            return exit_codes.FINISHED
        run = open_run(ranks, finetune, prepared.contents, alone=options.preflight)
        if options.preflight:
            return preflight(run)
    return run_job(Job(ranks, run, stages_of(prepared.recipe), prepared.summary, prepared.tokenizer,
                       prepared.make_data, prepared.make_weights, prepared.masks, prepared.origin,
                       prepared.teacher.teach))


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
