"""The log: a record for every step once, whatever was interrupted, and the same figures in
TensorBoard."""

from __future__ import annotations

import errno
import io
import json
import os
import sys

import pytest
import torch.utils.tensorboard as tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_spdf.runs import run_log
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.runs.writers.tensorboard import TensorBoard

BOARD = [(TensorBoard, True)]


@pytest.fixture
def run(recipe) -> RunDir:
    run = RunDir(recipe())
    run.create()
    return run


def write(run: RunDir, steps: range, resumed: int = 0, offset: float = 0.0, **options) -> None:
    """Logs `steps` in a process that goes on from step `resumed`."""
    log = RunLog(run, resumed, 10, **{"writers": BOARD, "active": True, **options})
    for step in steps:
        log.record("train", step, loss=step + offset, note="text")
        log.advance(step + offset)
    log.close()


def records(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in run.log.read_text().splitlines()]


def scalars(run: RunDir, name: str = "train/loss") -> list[tuple[int, float]]:
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_record_is_a_json_line_and_a_scalar(run):
    write(run, range(1, 4))
    assert records(run) == [{"kind": "train", "step": s, "loss": float(s), "note": "text"}
                            for s in (1, 2, 3)]
    assert scalars(run) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_text_stays_out_of_tensorboard(run):
    write(run, range(1, 2))
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss"]


def test_records_after_the_resumed_step_are_dropped(run):
    write(run, range(1, 6))
    write(run, range(4, 7), resumed=3, offset=0.5)
    steps = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert [(r["step"], r["loss"]) for r in records(run)] == steps
    assert scalars(run) == steps


def test_an_evaluation_that_will_be_done_again_is_dropped(run):
    log = RunLog(run, 0, 10, writers=(), active=True)
    for step in (2, 4):
        log.record("train", step, loss=1.0)
        log.record("valid", step, loss=2.0)
    log.close()
    RunLog(run, 4, 10, writers=(), active=True, evaluated=2).close()
    assert [(r["kind"], r["step"]) for r in records(run)] == [("train", 2), ("valid", 2),
                                                              ("train", 4)]


def test_start_from_nothing_drops_all(run):
    write(run, range(1, 4))
    write(run, range(1, 2), resumed=0, offset=0.5)
    assert [(r["step"], r["loss"]) for r in records(run)] == [(1, 1.5)]


@pytest.mark.parametrize("cut",
                         ['{"kind": "train", "step": 4, "lo', '{"kind": "train", "st', "{",
                          "\0\0\0\0"])
def test_line_cut_by_a_crash_is_dropped(run, cut):
    write(run, range(1, 4))
    with run.log.open("a") as file:
        file.write(cut)
    write(run, range(4, 5), resumed=3)
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4]


def test_record_is_on_disk_before_the_log_is_closed(run):
    log = RunLog(run, 0, 10, writers=(), active=True)
    log.record("train", 1, loss=2.0)
    assert records(run) == [{"kind": "train", "step": 1, "loss": 2.0}]
    log.close()


def test_no_tensorboard_where_none_is_wanted(run):
    write(run, range(1, 3), writers=())
    assert len(records(run)) == 2 and not run.tensorboard.exists()


def test_other_ranks_write_nothing(run, capsys):
    write(run, range(1, 3), active=False)
    log = RunLog(run, 0, 10, writers=BOARD, active=False)
    log.say("hello")
    log.close()
    assert not run.log.exists() and not run.tensorboard.exists()
    assert capsys.readouterr().out == ""


def test_said_text_is_on_standard_output(run, capsys):
    log = RunLog(run, 0, 10, writers=(), active=True)
    log.say("resumed from step_00000003")
    log.close()
    assert capsys.readouterr().out == "resumed from step_00000003\n"


@pytest.fixture
def disk(monkeypatch):
    """A disk that can be full: then every write of a file takes half of what it is given, and the
    next one nothing."""
    class Disk:
        full = False

    disk, write = Disk(), io.FileIO.write

    class File(io.FileIO):
        def write(self, content):
            if not disk.full:
                return write(self, content)
            if len(content) < 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, content[: len(content) // 2])

    monkeypatch.setattr(run_log, "open_to_append", lambda path, buffering: File(path, "ab"))
    return disk


def test_records_wait_while_the_disk_is_full(run, disk, capsys):
    log = RunLog(run, 0, 10, writers=(), active=True)
    for step in range(1, 8):
        disk.full = 3 <= step < 6
        log.record("train", step, loss=1.0)
        assert [r["step"] for r in records(run)] == list(range(1, 3 if disk.full else step + 1))
    log.close()
    said = capsys.readouterr().out
    assert said.count("could NOT write") == 1 and "No space left" in said
    assert said.count("can be written again") == 1


def test_a_log_that_cannot_be_opened_waits_too(run, capsys):
    run.log.mkdir()
    log = RunLog(run, 0, 10, writers=(), active=True)
    log.record("train", 1, loss=1.0)
    run.log.rmdir()
    log.record("train", 2, loss=1.0)
    log.close()
    assert [r["step"] for r in records(run)] == [1, 2]


def test_what_is_to_be_forgotten_is_forgotten_once_there_is_room(run, monkeypatch):
    write(run, range(1, 6))
    with monkeypatch.context() as full:
        full.setattr(run_log, "write_file", fail)
        log = RunLog(run, 3, 10, writers=(), active=True)
        log.record("train", 4, loss=4.5)
        assert [r["loss"] for r in records(run)] == [1, 2, 3, 4, 5]
    log.record("train", 5, loss=5.5)
    log.close()
    assert [r["loss"] for r in records(run)] == [1, 2, 3, 4.5, 5.5]


def fail(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensorboard_that_fails_ends_nothing_and_is_begun_again(run, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(run_log, "AGAIN_TIMES", 0)
    log = RunLog(run, 0, 10, writers=BOARD, active=True)
    log.record("train", 1, loss=1.0)
    with monkeypatch.context() as full:
        full.setattr(tensorboard.SummaryWriter, "add_scalar", fail)
        full.setattr(tensorboard, "SummaryWriter", fail)
        for step in (2, 3):
            log.record("train", step, loss=float(step))
    log.record("train", 4, loss=4.0)
    log.close()
    assert capsys.readouterr().out.count("could NOT write") == 1
    assert len(records(run)) == 4 and scalars(run) == [(1, 1.0), (4, 4.0)]


def test_a_closed_standard_output_ends_nothing(run, monkeypatch):
    log = RunLog(run, 0, 10, writers=(), active=True)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        log.say("hello")
        monkeypatch.undo()
        full.buffer.raw.close()
    log.close()


def test_nested_numbers_are_scalars_and_what_is_no_number_is_none(run):
    log = RunLog(run, 0, 10, writers=BOARD, active=True)
    log.record("train", 3, part={"of": {"it": 2, "text": "a"}, "nan": float("nan")}, loss=None,
               count=7)
    log.close()
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["train/count", "train/part/of/it"]
    assert scalars(run, "train/part/of/it") == [(3, 2.0)]


def test_tensorboard_is_tried_again_after_a_minute_only(run, monkeypatch):
    clock, made = [1000.0], []
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda *_, **options: made.append(
        (clock[0], options["purge_step"])) or fail())
    log = RunLog(run, 4, 10, writers=BOARD, active=True)
    for step, now in ((5, 1059.0), (6, 1061.0), (7, 1062.0), (8, 1122.0)):
        clock[0] = now
        log.record("train", step, loss=1.0)
    log.close()
    # after the step where the run goes on, then after each that was lost
    assert made == [(1000.0, 5), (1061.0, 5), (1122.0, 7)]


def test_of_lines_that_wait_the_newest_ten_thousand_stay(run, disk, monkeypatch):
    assert run_log.MOST_WAITING == 10_000
    monkeypatch.setattr(run_log, "MOST_WAITING", 3)
    log = RunLog(run, 0, 10, writers=(), active=True)
    disk.full = True
    for step in range(1, 6):
        log.record("train", step, loss=1.0)
    disk.full = False
    log.record("train", 6, loss=1.0)
    log.close()
    assert [r["step"] for r in records(run)] == [4, 5, 6]


def test_the_bar_goes_on_where_the_run_does(run, monkeypatch):
    made = []

    class Bar:
        def __init__(self, **options):
            made.append(options)

        def set_postfix(self, **shown):
            made.append(shown)

        def update(self):
            made.append("on")

        def close(self):
            made.append("closed")

    monkeypatch.setattr(run_log, "tqdm", Bar)
    log = RunLog(run, 4, 10, writers=(), active=True)
    log.advance(2.34567)
    log.close()
    options, shown, on, closed = made
    assert (options["initial"], options["total"], options["unit"]) == (4, 10, "step")
    assert options["disable"] is True  # no terminal
    assert (shown, on, closed) == ({"loss": "2.346", "refresh": False}, "on", "closed")


def test_a_resumed_log_keeps_evaluations_up_to_its_step_where_none_is_said(run):
    log = RunLog(run, 0, 10, writers=(), active=True)
    for step in (3, 4):
        log.record("valid", step, loss=2.0)
    log.close()
    RunLog(run, 3, 10, writers=(), active=True).close()
    assert [r["step"] for r in records(run)] == [3]
