#!/usr/bin/env python3
"""Sparse or dense pre-training of a GPT.

    python pretrain.py RECIPE.yaml [section.key=value ...] [--dry-run]
    torchrun --nproc-per-node 8 pretrain.py configs/pretrain/gpt2_small_s75.yaml
    srun python pretrain.py configs/pretrain/gpt3_xl_s75.yaml parallel.tensor=2 parallel.data=8

One process per GPU. A run goes on from the newest complete checkpoint in its output directory by
itself. A recipe with `stages:` (V-SPDF) is one run too: where a stage ends, its checkpoint is
densified into the engine of the next. Exit codes: 0 finished; 2 bad input; 3 stopped by a guard; 4
a rank is lost; 75 stopped on SIGTERM or SIGUSR1, a checkpoint saved.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megatron_spdf import exit_codes
from megatron_spdf.checkpoint.shared_files import NotSharedFilesystem, newest_of_all
from megatron_spdf.checkpoint.store import step_of
from megatron_spdf.data.pretraining.corpus import Corpus, check_corpus
from megatron_spdf.model.parametrization import render_parametrization
from megatron_spdf.parallel.ranks import join, leave
from megatron_spdf.planning.memory import render_layout
from megatron_spdf.planning.moves import render_moves
from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.load import load_recipe, render_recipe
from megatron_spdf.resilience.restarts import RestartLimit
from megatron_spdf.resilience.signals import StopRequest
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.resilience.world import Ranks, check_world, find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.schedule.stages import RunStage, stages_left, stages_of
from megatron_spdf.sparsity.plan import render_plan


def main() -> int:
    """Checks everything that can be checked without a device, then trains."""
    options = parse_arguments()
    try:
        ranks = find_ranks()
        recipe = load_recipe(options.recipe, options.overrides, ranks.world)
        stages = stages_of(recipe)  # one, where the recipe names none
        summary = "\n".join(summarize(stage) for stage in stages)
        if options.dry_run:
            print(f"{render_recipe(recipe)}\n{summary}")
            return exit_codes.FINISHED
        check_world(ranks, recipe.parallel)
        run = RunDir(recipe)
        run.check()
        corpus = check_corpus(recipe)
        if options.preflight:
            run.preflight()
            print(run.root)
            return exit_codes.FINISHED
    except (ValueError, FileNotFoundError) as error:
        return refuse(error)
    except RestartLimit as error:
        return refuse(error, exit_codes.GUARD_STOPPED)
    return join_and_pretrain(stages, ranks, run, corpus, summary)


def summarize(stage: RunStage) -> str:
    """What a stage of a run is: its plan, parametrization, layout and bytes per rank."""
    rules = render_parametrization(stage.recipe, stage.plan, stage.recipe.model.weights())
    moves = render_moves(stage.alone, stage.plan)
    return "\n".join(filter(None, [stage.heading, render_plan(stage.plan), moves, rules,
                                   render_layout(stage.recipe, stage.plan)]))


def join_and_pretrain(stages: list[RunStage], ranks: Ranks, run: RunDir, corpus: Corpus,
                      summary: str) -> int:
    """Joins the ranks, and pre-trains while they keep an ear on each other."""
    from megatron_spdf.parallel import fake_cuda
    from megatron_spdf.resilience import progress
    from megatron_spdf.resilience.heartbeat import Heartbeat

    stop = StopRequest()
    progress.observe()
    fake_cuda.install()  # before anything that imports megatron.core
    try:
        device = join(ranks, run.recipe)
    except ValueError as error:
        return refuse(error)
    except Unhealthy as error:
        return refuse(error, exit_codes.LOST_RANK)
    with Heartbeat(ranks, run.recipe.fault_tolerance.hang_seconds):
        return pretrain(stages, ranks, run, corpus, summary, stop, device)


def pretrain(stages: list[RunStage], ranks: Ranks, run: RunDir, corpus: Corpus, summary: str,
             stop: StopRequest, device: torch.device) -> int:
    """Does the stages that are left of a run, each from the last checkpoint of the one before."""
    code = exit_codes.FINISHED
    try:
        newest = newest_of_all(run.checkpoints)
        for stage in stages_left(stages, step_of(newest) if newest else 0):
            if code == exit_codes.FINISHED:
                code = pretrain_stage(stage, ranks, run, corpus, summary, stop, device)
                summary = ""
        return code
    except NotSharedFilesystem as error:
        return refuse(error)
    finally:
        leave()


def pretrain_stage(stage: RunStage, ranks: Ranks, run: RunDir, corpus: Corpus, summary: str,
                   stop: StopRequest, device: torch.device) -> int:
    """Builds the engine, restores the newest checkpoint, or densifies that of the stage before, and
    trains to the stage's end, which is mostly the run's."""
    from megatron_spdf.checkpoint.checkpointer import Checkpointer
    from megatron_spdf.checkpoint.saving import SaveFailed
    from megatron_spdf.data.pretraining.dataset import TokenData
    from megatron_spdf.engine.factory import make_engine
    from megatron_spdf.layers.measure import SparsityDrift
    from megatron_spdf.runs.run_log import RunLog
    from megatron_spdf.training.autotune import choose_micro_batch
    from megatron_spdf.training.loop import NotFinite, Trainer

    try:
        stage, settled = choose_micro_batch(stage, run, device)
        recipe, plan = stage.recipe, stage.plan
        engine = make_engine(stage.alone, plan, device)
        run.create_on_rank_0()
        checkpointer = Checkpointer(run.checkpoints, recipe, plan, corpus.tokenizer)
        state, found = checkpointer.restore(engine, border=stage.first)
    except ValueError as error:
        return refuse(error)
    data = TokenData(recipe, corpus, run.cache, engine.needs_batches)
    log = RunLog(run, state.step, recipe.steps, recipe.log.tensorboard, active=ranks.rank == 0,
                 evaluated=state.evaluated)
    log.say("\n".join(filter(None, [summary, engine.choices, stage.heading, *settled, *found])))
    try:
        code = Trainer(recipe, plan, engine, data, checkpointer, state, log, stop,
                       stage.first, stage.last, stage.flops_before).run()
        if stage.number < stage.count:
            engine.close()  # to make room for the next
        return code
    except (NotFinite, SparsityDrift, SaveFailed) as error:
        log.say(f"stopped: {error}")
        return exit_codes.GUARD_STOPPED
    finally:
        log.close()


def refuse(error: Exception, code: int = exit_codes.BAD_INPUT) -> int:
    print(f"pretrain.py: {error}", file=sys.stderr)
    return code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"fields of a recipe (name, type, default, meaning):\n\n{render_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, see configs/pretrain")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                        help="values that win over the recipe's")
    parser.add_argument("--dry-run", action="store_true",
                        help="validate the recipe, print it with every default, sparsity plan, "
                             "layout and bytes per rank, and exit")
    parser.add_argument("--preflight", action="store_true",
                        help="once before the ranks of a batch job: check all that needs no "
                             "device, count the start (fault_tolerance.max_starts), print the run "
                             "directory, and exit")
    # from deepspeed's launcher, like LOCAL_RANK
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
