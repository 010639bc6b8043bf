"""Path of a run: checks that need no device -> join ranks -> for each stage: build the engine,
restore the newest checkpoint, train.

`pretrain.py` and `finetune.py` make a `Job` of their recipe and run it.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel

from megatron_spdf import exit_codes
from megatron_spdf.checkpoint.run_metadata import INITIAL, Masks
from megatron_spdf.checkpoint.shared_files import newest_of_all
from megatron_spdf.checkpoint.store import step_of
from megatron_spdf.command_line import make_parser, print_words, say
from megatron_spdf.data.indexed.tokens import DataFault, NoToken
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.locks import Held
from megatron_spdf.parallel.ranks import destroy, init_groups, join
from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.words import add_overrides
from megatron_spdf.resilience.restarts import RestartLimit
from megatron_spdf.resilience.signals import StopRequest
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.resilience.world import Ranks, check_world
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.writers.base import check_writers, chosen
from megatron_spdf.schedule.stages import RunStage, stages_left
from megatron_spdf.text import has_remedy, sentence_of

if TYPE_CHECKING:  # these import megatron.core
    from megatron_spdf.data.finetuning.completions import CompletionData
    from megatron_spdf.data.pretraining.dataset import TokenData
    from megatron_spdf.engine.base import Engine
    from megatron_spdf.model.init import InitialWeights

REFUSALS = {ValueError: exit_codes.BAD_INPUT, FileNotFoundError: exit_codes.BAD_INPUT,
            RestartLimit: exit_codes.GUARD_STOPPED, Unhealthy: exit_codes.LOST_RANK}


@dataclass(frozen=True)
class Job:
    """A training run that has passed every check that needs no device.

    Attributes:
        ranks: this process among all.
        stages: of the run, in order.
        summary: for the log.
        tokenizer: kept with every checkpoint.
        make_data: makes this rank's batches for the recipe and the engine of a stage.
        make_weights: gives the weights to start from; None: they are drawn anew.
        masks, origin: of the weights at step 0, for the record of checkpoints; masks None: those
            that the plan draws.
        teach: puts the teacher of a distillation beside the model of an engine.
    """

    ranks: Ranks
    run: RunDir
    stages: Sequence[RunStage]
    summary: str
    tokenizer: Tokenizer
    make_data: Callable[[Recipe, Engine], TokenData | CompletionData]
    make_weights: Callable[[], InitialWeights | None] = lambda: None
    masks: Masks | None = None
    origin: str = INITIAL
    teach: Callable[[Engine], None] = lambda engine: None


def parse_arguments(text: str, kind: type[BaseModel], recipes: str) -> argparse.Namespace:
    """Reads the command line of a job.

    Args:
        text: the program's help.
        kind: of recipe, whose fields the help lists.
        recipes: directory of examples.
    """
    parser = make_parser(text, epilog="fields of a recipe (name, type, default, meaning):\n\n"
                                      f"{render_help(kind)}")
    parser.add_argument("recipe", help=f"YAML file, see {recipes}")
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="validate the recipe, and the checkpoint and data of fine-tuning; "
                             "print it with every default, sparsity plan, layout and bytes per "
                             "rank, and exit")
    parser.add_argument("--preflight", action="store_true",
                        help="once before the ranks of a batch job: check all that needs no "
                             "device, count the start (fault_tolerance.max_starts), print the run "
                             "directory as --print-output does, and exit")
    parser.add_argument("--print-output", action="store_true",
                        help="for a script: print the run directory, a NUL before and after it, "
                             "after the checks of the recipe, and exit")
    # from deepspeed's launcher, like LOCAL_RANK
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the program with a sentence and an exit code at an error of `REFUSALS`, or of the
    system, which a user can put right."""
    try:
        yield
    except (*REFUSALS, OSError) as error:
        if not isinstance(error, tuple(REFUSALS)) and not has_remedy(error):
            raise
        say(f"{Path(sys.argv[0]).name}: {sentence_of(error)}", sys.stderr)
        code = next((c for kind, c in REFUSALS.items() if isinstance(error, kind)),
                    exit_codes.BAD_INPUT)
        raise SystemExit(code) from None


def open_run(ranks: Ranks, recipe: Recipe | Finetune, contents: dict[str, str],
             alone: bool) -> RunDir:
    """Opens the directory of a run, after checking that it may start there with these ranks. Rank 0
    takes it, until the process ends; the others learn in `run_job` if it could not.

    Args:
        ranks: this process among all.
        recipe: of the run.
        contents: of its inputs, see `RunDir`.
        alone: whether this process does not join the others.

    Raises:
        ValueError: another number of ranks than the layout has, a writer of the log that this
            machine lacks, another run's directory, or one that another job has.
    """
    check_world(ranks, recipe.parallel)
    check_writers(recipe.log)
    run = RunDir(recipe, contents)
    run.check()
    if ranks.rank == 0:
        run.take()
    if run.held and (ranks.world == 1 or alone):
        raise Held(run.held)
    return run


def preflight(run: RunDir) -> int:
    """Counts a start of the run, prints its directory and returns the exit code.

    Raises:
        ValueError, RestartLimit: see `RunDir.preflight`.
    """
    try:
        run.preflight()
    finally:
        run.lock.let_go()
    print_words([str(run.root)])
    return exit_codes.FINISHED


def run_job(job: Job) -> int:
    """Joins the ranks, trains with a heartbeat between them, and returns the exit code."""
    try:
        return _run_job(job)
    finally:
        job.run.lock.let_go()


def _run_job(job: Job) -> int:
    from megatron_spdf.parallel import fake_cuda
    from megatron_spdf.resilience import progress
    from megatron_spdf.resilience.heartbeat import Heartbeat

    faulthandler.enable()  # a bus error, of a file that vanished, says where
    stop = StopRequest()
    progress.instrument_collectives()
    fake_cuda.install()  # before anything that imports megatron.core
    recipe = job.stages[0].recipe
    with ExitStack() as watch:
        with refusals():
            joined = join(job.ranks, recipe)
            watch.enter_context(Heartbeat(
                job.ranks, joined.store, job.run.recipe.fault_tolerance.hang_seconds,
                {NoToken: exit_codes.BAD_INPUT}))
            init_groups(joined, recipe)
            job.run.require_taken()
        return train(job, stop, joined.device)


def train(job: Job, stop: StopRequest, device: torch.device) -> int:
    """Trains the stages that are left, each from the last checkpoint of the one before."""
    try:
        with refusals():
            newest = newest_of_all(job.run.checkpoints)
        for stage in stages_left(job.stages, step_of(newest) if newest else 0):
            code = train_stage(job, stage, stop, device)
            if code != exit_codes.FINISHED:
                break
            job = replace(job, summary="")  # said by the stage before
        return code
    finally:
        destroy()


def train_stage(job: Job, stage: RunStage, stop: StopRequest, device: torch.device) -> int:
    """Builds the engine, restores the newest checkpoint, or densifies or prunes that of the stage
    before, and trains to the end of the stage."""
    from megatron_spdf.checkpoint.checkpointer import Checkpointer
    from megatron_spdf.checkpoint.saving import SaveFailed
    from megatron_spdf.engine.factory import make_engine
    from megatron_spdf.layers.measure import SparsityDrift
    from megatron_spdf.runs.run_log import RunLog
    from megatron_spdf.training.autotune import choose_micro_batch
    from megatron_spdf.training.loop import NotFinite, Trainer

    run = job.run
    with refusals():
        stage, tried = choose_micro_batch(stage, run, device, job.teach)
        recipe, plan = stage.recipe, stage.plan
        engine = make_engine(stage.as_single_run, plan, device, job.make_weights())
        job.teach(engine)
        run.create_on_rank_0()
        checkpointer = Checkpointer(run.checkpoints, recipe, plan, job.tokenizer, job.masks,
                                    job.origin)
        state, found = checkpointer.restore(engine, stage.first, stage.continues)
    data = job.make_data(recipe, engine)
    log = RunLog(run, state.step, recipe.steps, chosen(recipe.log), active=job.ranks.rank == 0,
                 evaluated=state.evaluated)
    log.say("\n".join(filter(None, [job.summary, engine.choices, stage.heading, *tried, *found])))
    try:
        code = Trainer(stage, engine, data, checkpointer, state, log, stop).run()
        engine.close()  # to make room for the next; its process groups end their threads
        return code
    except (NotFinite, SparsityDrift, SaveFailed) as error:
        log.say(f"stopped: {error}")
        return exit_codes.GUARD_STOPPED
    except DataFault as fault:
        if job.ranks.world > 1:
            raise  # the heartbeat tells the other ranks, which wait for this one
        log.say(f"stopped: {fault}")
        return exit_codes.BAD_INPUT
    finally:
        log.close()
