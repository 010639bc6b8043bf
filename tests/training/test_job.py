"""Errors that a user can put right end a run with a sentence and their exit code; and what a job
hands to all that it is made of."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest

from megatron_spdf.checkpoint import checkpointer
from megatron_spdf.checkpoint.run_metadata import RunState
from megatron_spdf.checkpoint.saving import SaveFailed
from megatron_spdf.checkpoint.shared_files import NotSharedFilesystem
from megatron_spdf.data.indexed.tokens import DataFault, NoToken
from megatron_spdf.engine import factory
from megatron_spdf.layers.measure import SparsityDrift
from megatron_spdf.locks import Held
from megatron_spdf.parallel import fake_cuda
from megatron_spdf.resilience import heartbeat, progress
from megatron_spdf.resilience.restarts import RestartLimit
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.resilience.world import Ranks
from megatron_spdf.runs import run_log
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.training import autotune, job, loop
from megatron_spdf.training.job import Job, refusals
from megatron_spdf.training.loop import NotFinite


@pytest.mark.parametrize(("kind", "code"), [
    (ValueError, 2), (FileNotFoundError, 2), (NotSharedFilesystem, 2), (NoToken, 2),
    (RestartLimit, 3), (Unhealthy, 4)])
def test_a_refusal_has_an_exit_code_and_a_line(kind, code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/there/pretrain.py"])
    with pytest.raises(SystemExit) as ended, refusals():
        raise kind("what is wrong")
    assert ended.value.code == code
    assert capsys.readouterr().err == "pretrain.py: what is wrong\n"


def test_other_errors_keep_their_trace():
    with pytest.raises(KeyError), refusals():
        raise KeyError("a fault of the program")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR,
                                    errno.ELOOP, errno.ENOSPC])
def test_a_path_that_a_user_can_put_right_ends_with_the_remedy(number, capsys):
    with pytest.raises(SystemExit) as ended, refusals():
        raise OSError(number, os.strerror(number), "data/train.bin")
    assert ended.value.code == 2
    assert f"data/train.bin: {os.strerror(number)}; " in capsys.readouterr().err


def test_an_error_of_a_disk_or_a_network_keeps_its_trace():
    for number in (errno.EIO, errno.ECONNREFUSED, errno.ETIMEDOUT):
        with pytest.raises(OSError), refusals():
            raise OSError(number, os.strerror(number))


class Noted(list):
    """Calls in their order, by name; what is made by one is named like it."""

    def of(self, name: str, gives=None):
        def call(*arguments, **keywords):
            self.append((name, *arguments, *keywords.items()))
            return name if gives is None else gives
        return call


STAGES = [{"share": 0.4, "sparsity": 0.75}, {"share": 0.6, "sparsity": 0.0}]


@pytest.fixture
def wired(recipe, monkeypatch):
    """A job of two stages whose parts note what they are handed, and their notes."""
    def make(rank: int = 0, world: int = 2, ends=lambda: 0, gradual: bool = False):
        noted = Noted()
        made = recipe(fault_tolerance={"hang_seconds": 77.0}, **(
            {"sparsity": {"level": 0.75, "algorithm": "gmp", "update": {"every": 1}}} if gradual
            else {"stages": STAGES}))
        engine = SimpleNamespace(choices="choices", close=noted.of("close"))
        state = RunState(4, evaluated=3)
        checkpoints = SimpleNamespace(restore=noted.of("restore", (state, ["found"])))
        log = SimpleNamespace(say=noted.of("say"), close=noted.of("log closed"))
        monkeypatch.setattr(autotune, "choose_micro_batch", lambda stage, *others: (
            noted.append(("choose", stage.number, *others)) or (stage, ["tried"])))
        monkeypatch.setattr(factory, "make_engine", noted.of("engine", engine))
        monkeypatch.setattr(checkpointer, "Checkpointer", noted.of("checkpointer", checkpoints))
        monkeypatch.setattr(run_log, "RunLog", noted.of("log", log))
        monkeypatch.setattr(job, "chosen", lambda section: ("writers", section))
        monkeypatch.setattr(loop, "Trainer", lambda *parts: (
            noted.append(("trainer", *parts)) or SimpleNamespace(run=ends)))
        run = SimpleNamespace(checkpoints="checkpoints", recipe=made, root="root",
                              create_on_rank_0=noted.of("created"),
                              require_taken=noted.of("taken"),
                              lock=SimpleNamespace(let_go=noted.of("let go")))
        return Job(Ranks(rank, world, rank, "test"), run, stages_of(made), "summary", "tokenizer",
                   noted.of("data"), noted.of("weights"), "masks", "origin",
                   noted.of("teach")), noted, engine, checkpoints, state, log
    return make


@pytest.mark.parametrize(("gradual", "number"), [(False, 0), (False, 1), (True, 1)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_hands_each_part_what_is_its(wired, gradual, number, rank):
    """And in one order: ranks wait for one another in several of them."""
    made, noted, engine, checkpoints, state, log = wired(rank, gradual=gradual)
    stage = made.stages[number]
    own, first = stage.as_single_run, stage.first
    assert own.steps == stage.steps and (gradual or own.steps < stage.recipe.steps)
    assert job.train_stage(made, stage, "stop", "device") == 0
    assert noted == [
        ("choose", stage.number, made.run, "device", made.teach),
        ("weights",), ("engine", own, stage.plan, "device", "weights"), ("teach", engine),
        ("created",),
        ("checkpointer", "checkpoints", stage.recipe, stage.plan, "tokenizer", "masks", "origin"),
        ("restore", engine, first, gradual), ("data", stage.recipe, engine),
        ("log", made.run, 4, 10, ("writers", stage.recipe.log), ("active", rank == 0),
         ("evaluated", 3)),
        ("say", f"summary\nchoices\n{stage.heading}\ntried\nfound"),
        ("trainer", stage, engine, "data", checkpoints, state, log, "stop"),
        ("close",), ("log closed",)]


@pytest.mark.parametrize(("error", "world", "code"), [
    (NotFinite("why"), 2, 3), (SparsityDrift("why"), 2, 3), (SaveFailed("why"), 2, 3),
    (DataFault("why"), 1, 2), (DataFault("why"), 2, None), (KeyError("why"), 1, None)], ids=repr)
def test_what_ends_a_stage_has_an_exit_code_and_the_log_is_closed(wired, error, world, code):
    """A fault of one rank's data is told to the others by the heartbeat, which sees it raised."""
    def fails() -> int:
        raise error

    made, noted, *_ = wired(world=world, ends=fails)
    if code is None:
        with pytest.raises(type(error)):
            job.train_stage(made, made.stages[0], "stop", "device")
    else:
        assert job.train_stage(made, made.stages[0], "stop", "device") == code
        assert ("say", "stopped: why") in noted
    assert noted[-1] == ("log closed",)


@pytest.mark.parametrize(("codes", "newest", "ran"), [
    ([0, 0], None, [1, 2]), ([75, 0], None, [1]), ([3, 0], 2, [1]), ([0], 4, [2]), ([0], 10, [2])])
def test_stages_that_are_left_run_until_one_does_not_finish(wired, monkeypatch, codes, newest, ran):
    made, noted, *_ = wired()
    left, asked = list(codes), []
    monkeypatch.setattr(job, "newest_of_all", lambda place: (
        None if newest is None else SimpleNamespace(name=f"step_{newest:08d}")))
    monkeypatch.setattr(job, "destroy", noted.of("destroyed"))
    monkeypatch.setattr(job, "train_stage", lambda job, stage, *others: (
        asked.append((stage.number, job.summary, *others)) or left.pop(0)))
    assert job.train(made, "stop", "device") == codes[len(ran) - 1]
    assert asked == [(number, "" if place else "summary", "stop", "device")
                     for place, number in enumerate(ran)]
    assert noted == [("destroyed",)]


@pytest.mark.parametrize("refused", [None, "join", "groups", "taken"])
def test_a_job_joins_is_watched_and_lets_go_of_its_directory(wired, monkeypatch, refused):
    made, noted, *_ = wired()

    def refuse(*_):
        raise ValueError("why")

    monkeypatch.setattr(job.faulthandler, "enable", noted.of("faults"))
    monkeypatch.setattr(job, "StopRequest", noted.of("stop"))
    monkeypatch.setattr(progress, "instrument_collectives", noted.of("collectives"))
    monkeypatch.setattr(fake_cuda, "install", noted.of("stand-in"))
    joined = SimpleNamespace(store="store", device="device")
    monkeypatch.setattr(job, "join", refuse if refused == "join" else noted.of("join", joined))
    monkeypatch.setattr(job, "init_groups", refuse if refused == "groups" else noted.of("groups"))
    if refused == "taken":
        made.run.require_taken = refuse
    monkeypatch.setattr(heartbeat, "Heartbeat", lambda *parts: closing(SimpleNamespace(
        close=noted.of("left"), noted=noted.append(("heartbeat", *parts)))))
    monkeypatch.setattr(job, "train", noted.of("train", 75))
    before = [("faults",), ("stop",), ("collectives",), ("stand-in",)]
    joining = [("join", made.ranks, made.stages[0].recipe),
               ("heartbeat", made.ranks, "store", 77.0, {NoToken: 2}),
               ("groups", joined, made.stages[0].recipe)]
    if refused:
        with pytest.raises(SystemExit) as ended:
            job.run_job(made)
        assert ended.value.code == 2
        done = {"join": 0, "groups": 2, "taken": 3}[refused]
        watched = [("left",)] * (refused != "join")
        assert noted == [*before, *joining[:done], *watched, ("let go",)]
        return
    assert job.run_job(made) == 75
    assert noted == [*before, *joining, ("taken",), ("train", made, "stop", "device"), ("left",),
                     ("let go",)]


@pytest.mark.parametrize(("rank", "world", "alone", "held", "raised"), [
    (0, 1, False, "", False), (0, 2, False, "", False), (1, 2, False, "", False),
    (0, 1, False, "by whom", True), (0, 2, True, "by whom", True), (0, 2, False, "by whom", False)])
def test_rank_0_takes_the_directory_and_the_others_learn_when_they_have_joined(
        recipe, monkeypatch, rank, world, alone, held, raised):
    noted, made = Noted(), recipe(parallel={"data": world})
    run = SimpleNamespace(check=noted.of("check"), take=noted.of("take"), held=held)
    monkeypatch.setattr(job, "RunDir", noted.of("run", run))
    monkeypatch.setattr(job, "check_world", noted.of("world"))
    monkeypatch.setattr(job, "check_writers", noted.of("writers"))
    ranks, contents = Ranks(rank, world, rank, "test"), {"data": "hash"}
    if raised:
        with pytest.raises(Held, match="by whom"):
            job.open_run(ranks, made, contents, alone)
    else:
        assert job.open_run(ranks, made, contents, alone) is run
    assert noted == [("world", ranks, made.parallel), ("writers", made.log),
                     ("run", made, contents), ("check",), *[("take",)] * (rank == 0)]
