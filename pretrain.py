#!/usr/bin/env python3
"""Sparse or dense pre-training of a decoder.

    python pretrain.py RECIPE.yaml [section.key=value ...] [--dry-run]
    torchrun --nproc-per-node 8 pretrain.py configs/pretrain/gpt2_small_s75.yaml
    srun python pretrain.py configs/pretrain/gpt3_xl_s75.yaml parallel.tensor=2 parallel.data=8

One process per GPU. A run goes on from the newest complete checkpoint in its output directory by
itself. A recipe with `stages:` (V-SPDF) is one run too: where a stage ends, its checkpoint is
densified into the engine of the next. Exit codes: 0 finished; 2 bad input; 3 stopped by a guard; 4
a rank is lost; 75 stopped on SIGTERM or SIGUSR1, a checkpoint saved.
"""

from __future__ import annotations

import sys

from megatron_spdf import exit_codes
from megatron_spdf.command_line import hear_interrupts, print_words
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.tokenizers.base import render_padding
from megatron_spdf.model.parametrization import render_parametrization
from megatron_spdf.planning.memory import render_layout
from megatron_spdf.planning.moves import render_moves
from megatron_spdf.recipe.load import load_recipe, render_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.schedule.stages import RunStage, stages_of
from megatron_spdf.sparsity.plan import render_plan
from megatron_spdf.training.job import Job, open_run, parse_arguments, preflight, refusals, run_job
from megatron_spdf.training.teacher import Teacher


def main() -> int:
    """Checks everything that can be checked without a device, then trains."""
    with refusals():
        options = parse_arguments(__doc__, Recipe, "configs/pretrain")
        ranks = find_ranks()
        recipe = load_recipe(options.recipe, options.overrides, ranks.world)
        stages = stages_of(recipe)  # one, where the recipe names none
        summary = "\n".join(summarize(stage) for stage in stages)
        if options.print_output:
            print_words([recipe.output])
            return exit_codes.FINISHED
        if options.dry_run:
            print(f"{render_recipe(recipe)}\n{summary}")
            return exit_codes.FINISHED
        corpus = check_corpus(recipe)
        teacher = Teacher(recipe, corpus.tokenizer)
        run = open_run(ranks, recipe, {**corpus.contents, **teacher.contents},
                       alone=options.preflight)
        if options.preflight:
            return preflight(run)

    def make_data(recipe, engine):
        from megatron_spdf.data.pretraining.dataset import TokenData  # imports megatron.core

        return TokenData(recipe, corpus, run.cache, engine.needs_batches)

    summary = "\n".join(filter(None, [
        summary, teacher.summary, render_padding(corpus.tokenizer, recipe.model.vocab_size)]))
    return run_job(Job(ranks, run, stages, summary, corpus.tokenizer, make_data,
                       teach=teacher.teach))


def summarize(stage: RunStage) -> str:
    """Plan, parametrization, layout and bytes per rank of a stage."""
    rules = render_parametrization(stage.recipe, stage.plan, stage.recipe.model.weights())
    moves = render_moves(stage.as_single_run, stage.plan)
    return "\n".join(filter(None, [stage.heading, render_plan(stage.plan), moves, rules,
                                   render_layout(stage.recipe, stage.plan)]))


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
