#!/usr/bin/env python3
"""Dense or sparse fine-tuning of a pre-trained GPT on contexts and completions.

    python finetune.py RECIPE.yaml checkpoint=RUN [section.key=value ...] [--dry-run]
    deepspeed --num_gpus 2 finetune.py configs/finetune/e2e.yaml checkpoint=RUN parallel.data=2
    torchrun --nproc-per-node 8 finetune.py configs/finetune/e2e.yaml checkpoint=RUN parallel.data=8
    srun python finetune.py configs/finetune/e2e.yaml checkpoint=RUN parallel.data=8

One process per GPU. A run goes on from the newest complete checkpoint in its output directory by
itself. Exit codes: 0 finished; 2 bad input; 3 stopped by a guard; 4 a rank is lost; 75 stopped on
SIGTERM or SIGUSR1, a checkpoint saved.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megatron_spdf import exit_codes
from megatron_spdf.convert.source import WeightSource, open_weights
from megatron_spdf.parallel.ranks import join, leave
from megatron_spdf.recipe.finetune import Finetune, load_finetune
from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.load import render_recipe
from megatron_spdf.resilience.restarts import RestartLimit
from megatron_spdf.resilience.signals import StopRequest
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.resilience.world import Ranks, check_world, find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.training.finetune_setup import Prepared, prepare


def main() -> int:
    """Checks everything that can be checked without a device, then fine-tunes."""
    options = parse_arguments()
    try:
        ranks = find_ranks()
        finetune = load_finetune(options.recipe, options.overrides, ranks.world)
        start = open_weights(finetune.checkpoint, checksums=False)
        prepared = prepare(finetune, start)
        if options.dry_run:
            print(f"{render_recipe(finetune)}\n{prepared.summary}")
            return exit_codes.FINISHED
        check_world(ranks, finetune.parallel)
        run = RunDir(finetune)
        run.check()
        if options.preflight:
            run.preflight()
            print(run.root)
            return exit_codes.FINISHED
    except (ValueError, FileNotFoundError) as error:
        return refuse(error)
    except RestartLimit as error:
        return refuse(error, exit_codes.GUARD_STOPPED)
    return join_and_train(finetune, start, prepared, ranks, run)


def join_and_train(finetune: Finetune, start: WeightSource, prepared: Prepared, ranks: Ranks,
                   run: RunDir) -> int:
    """Joins the ranks, and fine-tunes while they keep an ear on each other."""
    from megatron_spdf.parallel import fake_cuda
    from megatron_spdf.resilience import progress
    from megatron_spdf.resilience.heartbeat import Heartbeat

    stop = StopRequest()
    progress.observe()
    fake_cuda.install()  # before anything that imports megatron.core
    try:
        device = join(ranks, prepared.recipe)
    except ValueError as error:
        return refuse(error)
    except Unhealthy as error:
        return refuse(error, exit_codes.LOST_RANK)
    with Heartbeat(ranks, finetune.fault_tolerance.hang_seconds):
        return train(finetune, start, prepared, ranks, run, stop, device)


def train(finetune: Finetune, start: WeightSource, prepared: Prepared, ranks: Ranks, run: RunDir,
          stop: StopRequest, device: torch.device) -> int:
    """Builds the engine on the starting weights, restores the newest checkpoint, trains to the
    end."""
    from megatron_spdf.checkpoint.checkpointer import Checkpointer
    from megatron_spdf.checkpoint.saving import SaveFailed
    from megatron_spdf.data.finetuning.completions import CompletionData
    from megatron_spdf.engine.factory import make_engine
    from megatron_spdf.layers.measure import SparsityDrift
    from megatron_spdf.model.init import LoadedWeights
    from megatron_spdf.runs.run_log import RunLog
    from megatron_spdf.training.loop import NotFinite, Trainer

    recipe, plan = prepared.recipe, prepared.plan
    revived = finetune.revived_scale if finetune.revived == "normal" else 0.0
    weights = LoadedWeights(start.master, start.mask_bits if plan.weights else None, revived,
                            finetune.seed, recipe.model.slices)
    try:
        engine = make_engine(recipe, plan, device, weights)
        run.create_on_rank_0()
        checkpointer = Checkpointer(run.checkpoints, recipe, plan, prepared.tokenizer)
        checkpointer.masks, checkpointer.origin = prepared.masks, prepared.origin
        state, found = checkpointer.restore(engine)
    except ValueError as error:
        return refuse(error)
    data = CompletionData(recipe, prepared.train, prepared.valid, prepared.tokenizer.eod,
                          engine.data_parallel_rank)
    log = RunLog(run, state.step, recipe.steps, recipe.log.tensorboard, active=ranks.rank == 0,
                 evaluated=state.evaluated)
    log.say("\n".join([prepared.summary, engine.choices, *found]))
    try:
        return Trainer(recipe, plan, engine, data, checkpointer, state, log, stop).run()
    except (NotFinite, SparsityDrift, SaveFailed) as error:
        log.say(f"stopped: {error}")
        return exit_codes.GUARD_STOPPED
    finally:
        log.close()
        leave()


def refuse(error: Exception, code: int = exit_codes.BAD_INPUT) -> int:
    print(f"finetune.py: {error}", file=sys.stderr)
    return code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"fields of a recipe (name, type, default, meaning):\n\n{render_help(Finetune)}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, see configs/finetune")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                        help="values that win over the recipe's")
    parser.add_argument("--dry-run", action="store_true",
                        help="validate recipe, checkpoint and data, print the recipe with every "
                             "default, layout and bytes per rank, and exit")
    parser.add_argument("--preflight", action="store_true",
                        help="once before the ranks of a batch job: check all that needs no "
                             "device, count the start (fault_tolerance.max_starts), print the run "
                             "directory, and exit")
    # from deepspeed's launcher, like LOCAL_RANK
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
