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


def seconds_to_take(lock: DirectoryLock) -> float:
    started = time.monotonic()
    lock.take()
    return time.monotonic() - started


def test_the_second_is_refused_with_the_name_of_the_first(lock, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock().take()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(Held, match=f"in use by process {os.getpid()} on {socket.gethostname()} of "
                                   "Slurm job 77, since 20.*choose another output"):
        lock().take()


def test_a_lock_that_was_let_go_is_free_and_one_file_stays(lock, tmp_path):
    for _ in range(3):
        one = lock()
        assert seconds_to_take(one) < 0.4
        (tmp_path / "run" / "log.jsonl").touch()
        one.let_go()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["lock.3", "log.jsonl"]


def test_a_directory_in_which_nothing_was_made_is_removed(lock, tmp_path):
    one = lock()
    one.take()
    one.let_go()
    assert not (tmp_path / "run").exists()


def test_a_killed_holder_does_not_block(lock, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], text=True,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(Held, match=f"process {holder.pid} "):
            lock().take()
        holder.kill()
        while Path(f"/proc/{holder.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        assert seconds_to_take(lock()) < 0.4  # a zombie, since nobody has waited for it


def test_another_process_of_the_same_number_does_not_block(lock, leave):
    leave(started=Holder.here().started - 1)
    assert seconds_to_take(lock()) < 0.4


def test_a_holder_elsewhere_that_gives_signs_of_life_is_seen(lock, leave, capsys):
    path = leave(**ELSEWHERE)
    hour = 3600 * 10**9  # its clock is wrong, and goes back

    def beat() -> None:
        for i in range(20):
            os.utime(path, ns=(0, hour * (100 - i)))
            time.sleep(0.05)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(Held, match="process 4711 on node7"):
        lock().take()
    thread.join()
    assert "waiting up to 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("age", [-10**6, 0, 10**6])
def test_a_holder_elsewhere_without_a_sign_of_life_does_not_block(lock, leave, age):
    os.utime(leave(**ELSEWHERE), (time.time() + age,) * 2)
    assert 0.4 < seconds_to_take(lock()) < 5


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
                                                            at_once):
    leave(**ELSEWHERE, **before)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    assert (seconds_to_take(lock()) < 0.4) == at_once


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
    while not said:
        time.sleep(0.01)
    assert "taken over by process 4711 on node7" in said[0]


def test_a_removed_lock_is_made_again(lock, tmp_path):
    lock().take()
    (tmp_path / "run" / "lock.1").unlink()
    time.sleep(0.5)
    with pytest.raises(Held):
        lock().take()


def test_a_file_system_that_fails_for_a_while_ends_nothing(lock, monkeypatch, tmp_path):
    lock().take()
    with monkeypatch.context() as patched:
        patched.setattr(os, "utime", lambda *_, **__: (_ for _ in ()).throw(OSError("stale")))
        time.sleep(0.3)
    before = (tmp_path / "run" / "lock.1").stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / "run" / "lock.1").stat().st_mtime_ns > before


def contend(directory: Path, gate, found) -> None:
    gate.wait()
    with suppress(Held):
        DirectoryLock(directory, print).take()
        found.put(os.getpid())
        time.sleep(1.5)  # the others look at this one


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_of_many_at_once_one_has_it(tmp_path, leave, dead):
    if dead:
        leave(started=1)
    context = multiprocessing.get_context("fork")
    gate, found = context.Event(), context.Queue()
    processes = [context.Process(target=contend, args=(tmp_path / "run", gate, found))
                 for _ in range(8)]
    for process in processes:
        process.start()
    gate.set()
    for process in processes:
        process.join()
    assert found.get(timeout=5) and found.empty()
