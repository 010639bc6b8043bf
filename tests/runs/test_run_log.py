"""The log: a record for every step once, whatever was interrupted, and the same figures in
TensorBoard."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.run_log import RunLog


@pytest.fixture
def run(recipe) -> RunDir:
    run = RunDir(recipe())
    run.create()
    return run


def write(run: RunDir, steps: range, resumed: int = 0, offset: float = 0.0, **options) -> None:
    """Logs `steps` in a process that goes on from step `resumed`."""
    log = RunLog(run, resumed, 10, **{"tensorboard": True, "active": True, **options})
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
    log = RunLog(run, 0, 10, tensorboard=False, active=True)
    for step in (2, 4):
        log.record("train", step, loss=1.0)
        log.record("valid", step, loss=2.0)
    log.close()
    RunLog(run, 4, 10, tensorboard=False, active=True, evaluated=2).close()
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
    log = RunLog(run, 0, 10, tensorboard=False, active=True)
    log.record("train", 1, loss=2.0)
    assert records(run) == [{"kind": "train", "step": 1, "loss": 2.0}]
    log.close()


def test_no_tensorboard_where_none_is_wanted(run):
    write(run, range(1, 3), tensorboard=False)
    assert len(records(run)) == 2 and not run.tensorboard.exists()


def test_other_ranks_write_nothing(run, capsys):
    write(run, range(1, 3), active=False)
    log = RunLog(run, 0, 10, tensorboard=True, active=False)
    log.say("hello")
    log.close()
    assert not run.log.exists() and not run.tensorboard.exists()
    assert capsys.readouterr().out == ""


def test_said_text_is_on_standard_output(run, capsys):
    log = RunLog(run, 0, 10, tensorboard=False, active=True)
    log.say("resumed from step_00000003")
    log.close()
    assert capsys.readouterr().out == "resumed from step_00000003\n"
