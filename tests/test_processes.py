"""Work shared among processes: its order, its errors, and processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_spdf.processes import ProcessDied, map_in_processes


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def divide(number: int) -> float:
    return 1 / number


def die_later(milliseconds: int) -> bytes:
    """Hands back many pieces, at one of which the process is killed."""
    threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes(64 << 20)


def note_and_wait(directory: str) -> None:
    """Leaves the number of its process."""
    open(os.path.join(directory, str(os.getpid())), "w").close()
    time.sleep(600)


@pytest.mark.parametrize("items", [range(9), range(1), ()])
def test_results_have_the_order_of_the_items(items):
    found = map_in_processes(square, items, 2)
    assert [result for result, _ in found] == [item * item for item in items]
    assert len({pid for _, pid in found} - {os.getpid()}) <= 2
    assert os.getpid() not in {pid for _, pid in found}


def test_what_the_function_raises_comes_with_its_trace():
    with pytest.raises(ZeroDivisionError) as raised:
        map_in_processes(divide, [1, 0, 2, 0], 2)
    assert "in divide" in raised.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.parametrize("milliseconds", [0, 4, 10, 20])
def test_one_that_is_killed_in_the_middle_of_a_result_is_said(milliseconds):
    said = []

    def run() -> None:
        with pytest.raises(ProcessDied, match="a process ended with exit code -9") as raised:
            map_in_processes(die_later, [milliseconds, 10**6] + [milliseconds] * 20, 2)
        said.append(raised)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(100)
    assert said


@pytest.mark.slow
def test_none_outlives_the_process_that_started_it(tmp_path):
    program = ("import sys\nfrom test_processes import note_and_wait\n"
               "from megatron_spdf.processes import map_in_processes\n"
               "map_in_processes(note_and_wait, sys.argv[1:] * 2, 2)")
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    run = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)],
                           env={**os.environ, "PYTHONPATH": paths})
    until = time.monotonic() + 100
    while len(os.listdir(tmp_path)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    processes = [psutil.Process(int(name)) for name in os.listdir(tmp_path)]
    run.kill()
    run.wait()
    assert len(processes) == 2 and not psutil.wait_procs(processes, timeout=60)[1]
