"""A directory has one holder at a time, on whatever machine, and a dead one does not block."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest

from megatron_spdf import locks
from megatron_spdf.locks import DirectoryLock, Held, Holder

ELSEWHERE = {"host": "node7", "machine": "another machine", "pid": 4711}
# Takes the lock of the directory, says so, and holds it until it is killed.
HOLD = """
import sys, time
from pathlib import Path
from megatron_spdf.locks import DirectoryLock
DirectoryLock(Path(sys.argv[1]), print).take()
print("taken", flush=True)
time.sleep(99)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Signs of life in tenths of a second."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "DEAD_SECONDS", 0.4)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lock(tmp_path):
    """Makes locks of one directory, as different jobs would, and lets go of them at the end."""
    made = []

    def make(**options) -> DirectoryLock:
        made.append(DirectoryLock(tmp_path / "run", **{"lost": pytest.fail, **options}))
        return made[-1]

    yield make
    for each in made:
        each.let_go()


@pytest.fixture
def leave(tmp_path):
    """Leaves the lock of a process that is gone or is elsewhere."""
    def write(number: int = 1, **changes) -> Path:
        (tmp_path / "run").mkdir(exist_ok=True)
        path = tmp_path / "run" / f"lock.{number}"
        path.write_text(json.dumps(asdict(replace(Holder.here(), **changes))))
        return path

    return write


@pytest.fixture
def waits(capsys):
    """Takes a lock; gives whether that began to look for signs of life, which it says."""
    def take(lock: DirectoryLock) -> bool:
        capsys.readouterr()
        lock.take()
        return "waiting up to 0 s to see" in capsys.readouterr().err

    return take


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_second_is_refused_with_the_name_of_the_first(lock, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock().take()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(Held, match=f"in use by process {os.getpid()} on {socket.gethostname()} of "
                                   "Slurm job 77, since 20.*choose another output"):
        lock().take()


def test_a_lock_that_was_let_go_is_free_and_one_file_stays(lock, tmp_path, waits):
    for _ in range(3):
        one = lock()
        assert not waits(one)
        (tmp_path / "run" / "log.jsonl").touch()
        one.let_go()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["lock.3", "log.jsonl"]


def test_a_directory_in_which_nothing_was_made_is_removed(lock, tmp_path):
    one = lock()
    one.take()
    one.let_go()
    assert not (tmp_path / "run").exists()


def test_a_killed_holder_does_not_block(lock, tmp_path, waits):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], text=True,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(Held, match=f"process {holder.pid} "):
            lock().take()
        holder.kill()
        until(lambda: Path(f"/proc/{holder.pid}/stat").read_text().split()[2] == "Z")
        assert not waits(lock())  # a zombie, since nobody has waited for it


def test_another_process_of_the_same_number_does_not_block(lock, leave, waits):
    leave(started=Holder.here().started - 1)
    assert not waits(lock())


def test_a_holder_elsewhere_that_gives_signs_of_life_is_seen(lock, leave, capsys,
                                                               monkeypatch):
    monkeypatch.setattr(locks, "DEAD_SECONDS", 30.0)  # a busy machine may come late with one
    path = leave(**ELSEWHERE)
    hour = 3600 * 10**9  # its clock is wrong, and goes back
    seen = threading.Event()

    def beat() -> None:
        for i in count():
            os.utime(path, ns=(0, hour * (10**6 - i)))
            if seen.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(Held, match="process 4711 on node7"):
        lock().take()
    seen.set()
    thread.join()
    assert "waiting up to 30 s" in capsys.readouterr().err


@pytest.mark.parametrize("age", [-10**6, 0, 10**6])
def test_a_holder_elsewhere_without_a_sign_of_life_does_not_block(lock, leave, age, waits):
    os.utime(leave(**ELSEWHERE), (time.time() + age,) * 2)
    began = time.monotonic()
    assert waits(lock()) and time.monotonic() > began + 0.4


@pytest.mark.parametrize("before, now, at_once", [
    ({"job": "77", "restart": 0}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, True),
    ({"job": "a:77", "restart": 1}, {"SLURM_CLUSTER_NAME": "a", "SLURM_JOB_ID": "77",
                                     "SLURM_RESTART_COUNT": "2"}, True),
    ({"job": "77", "restart": 1}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, False),
    ({"job": "76", "restart": 0}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, False),
    ({"job": "b:77", "restart": 0}, {"SLURM_CLUSTER_NAME": "a", "SLURM_JOB_ID": "77",
                                     "SLURM_RESTART_COUNT": "1"}, False),
    ({"job": "", "restart": 0}, {}, False)])
def test_a_requeued_job_goes_on_at_once_where_its_node_died(lock, leave, monkeypatch, before, now,
                                                            at_once, waits):
    leave(**ELSEWHERE, **before)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    assert waits(lock()) != at_once


def test_a_slow_process_does_not_take_the_place_of_a_lock_that_is_long_over(lock, leave, tmp_path,
                                                                           monkeypatch):
    """Others came and went between its look at the locks and its own: it looks again."""
    make, run = locks._make, tmp_path / "run"

    def slowly(path: Path, record: bytes) -> None:
        if path.name == "lock.1":
            leave(5)  # of this process, which runs
        make(path, record)

    monkeypatch.setattr(locks, "_make", slowly)
    with pytest.raises(Held, match=f"in use by process {os.getpid()}"):
        lock().take()
    assert [path.name for path in run.iterdir()] == ["lock.5"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 5000, '{"pid": []}', "\xff",
                                     '{"host": "a", "unknown": 1}', '{"pid": true}'])
def test_a_damaged_lock_blocks_no_longer_than_one_without_a_sign_of_life(lock, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock.1").write_text(content)
    lock().take()


def test_what_else_has_a_locks_name_neither_hangs_nor_is_written_through(lock, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run" / "lock.1").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "run" / "lock.2")
    lock().take()
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_name_of_a_stranger_reaches_the_terminal_without_control_characters(leave, lock):
    leave(host="\x1b[2Jnode\n")
    with pytest.raises(Held, match=r"on \\x1b\[2Jnode\\n, since"):
        lock().take()


def test_a_holder_that_slept_too_long_learns_that_it_lost_the_lock(lock, leave):
    said = []
    lock(lost=said.append).take()
    leave(2, **ELSEWHERE)
    until(lambda: said)
    assert "taken over by process 4711 on node7" in said[0]


def test_a_removed_lock_is_made_again(lock, tmp_path):
    lock().take()
    (tmp_path / "run" / "lock.1").unlink()
    until((tmp_path / "run" / "lock.1").exists)
    with pytest.raises(Held):
        lock().take()


def test_a_file_system_that_fails_for_a_while_ends_nothing(lock, monkeypatch, tmp_path):
    lock().take()
    with monkeypatch.context() as patched:
        patched.setattr(os, "utime", lambda *_, **__: (_ for _ in ()).throw(OSError("stale")))
        time.sleep(0.3)
    before = (tmp_path / "run" / "lock.1").stat().st_mtime_ns
    until(lambda: (tmp_path / "run" / "lock.1").stat().st_mtime_ns > before)


def contend(directory: Path, gate, found) -> None:
    gate.wait(60)
    with suppress(Held):
        DirectoryLock(directory, print).take()
        found.put(os.getpid())
    gate.wait(60)  # the others look at this one


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_of_many_at_once_one_has_it(tmp_path, leave, dead):
    if dead:
        leave(started=1)
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(8), context.Queue()
    processes = [context.Process(target=contend, args=(tmp_path / "run", gate, found))
                 for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert found.get(timeout=5) and found.empty()
