"""Runs functions on real gloo ranks, which a test asks for where it asserts.

    there = ranks(2).run(train, make_recipe(parallel={"tensor": 2}), steps=4)

is what tests/distributed/cases.py:train returned on rank 0, and `run_all` what it did on each rank.
The same call is run once in a test file. The ranks of a world are forks of a process that has
imported the engines once, since that takes seconds. They start with the first call and stay warm
for the others, until the test file ends. The fixture `ranks` is in tests/small_runs.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # seconds that a call may take, which takes tens of them on two busy cores
GRACE = 5.0  # seconds that the others have after a rank has raised
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
COMMON = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
          "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent),
                                        str(Path(__file__).parents[1] / "seams"),
                                        *filter(None, [os.environ.get("PYTHONPATH")])])}


@dataclass(order=True)
class Failure:
    """A call that raised on a rank, at a time on the machine's monotonic clock."""

    at: float
    trace: str


class Ranks:
    """Processes that run a function together, and what their calls returned.

    Args:
        world: number of ranks.
        directory: for logs of the ranks, and what runs write that have no directory of their own.
        plugins: modules that the ranks load, as `SPDF_PLUGINS` names them.
        gpu: let the ranks see a GPU.
    """

    def __init__(self, world: int, directory: Path, plugins: str = "", gpu: bool = False):
        self.world, self.directory, self.plugins, self.gpu = world, directory, plugins, gpu
        self._found: dict[str, list] = {}
        self._ranks: list[multiprocessing.Process] = []
        self._ends: list[connection.Connection] = []

    def run(self, function: Callable, *arguments, **keywords):
        """Returns what a function gives on rank 0, see `run_all`."""
        return self.run_all(function, *arguments, **keywords)[0]

    def run_all(self, function: Callable, *arguments, **keywords) -> list:
        """Returns what a function gives on each rank; it runs with the first call of its kind.

        Args:
            function: of a module that the ranks can import; returns plain values and tensors, which
                are pickled.
            arguments, keywords: plain values, tensors and such functions. Recipes whose `output` is
                None get a directory that calls of another kind do not have.

        Raises:
            AssertionError: it raised on a rank, with its trace; a rank died or was not done in
                time, with the logs.
        """
        call = json.dumps([function, arguments, keywords], default=_plain, sort_keys=True)
        if call not in self._found:
            output = self.directory / hashlib.sha256(call.encode()).hexdigest()[:16]
            self._found[call] = self._run(function, *_with_output([arguments, keywords],
                                                                  str(output)))
        if failures := _failures(self._found[call]):  # what was raised later comes of the first
            raise AssertionError(f"{function.__name__}:\n{min(failures).trace}")
        return self._found[call]

    def _run(self, function: Callable, arguments: list, keywords: dict) -> list:
        if not self._ranks:
            self._start()
        try:
            for rank, end in enumerate(self._ends):
                try:
                    end.send_bytes(pickle.dumps((function, arguments, keywords)))
                except OSError:
                    self._fail(f"rank {rank} had died", [])
            return self._results()
        except BaseException:  # pytest's time limit too: nobody reads what is still to come
            self.stop()
            raise

    def _results(self) -> list:
        """Waits for the ranks; ends those that wait for one that has raised."""
        waiting, until = dict(enumerate(self._ends)), time.monotonic() + TIMEOUT
        results: list = [None] * self.world
        while waiting:
            ready = connection.wait(waiting.values(), max(0.0, until - time.monotonic()))
            for rank in [r for r, end in waiting.items() if end in ready]:
                try:
                    results[rank] = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, OSError):  # the latter in the middle of a result
                    self._fail(f"rank {rank} died", results)
                if isinstance(results[rank], Failure):
                    until = min(until, time.monotonic() + GRACE)
            if not ready and not _failures(results):
                self._fail(f"ranks {list(waiting)} were not done after {TIMEOUT} s", results)
            if not ready:
                self.stop()
                break
        return results

    def _start(self) -> None:
        environment = {"WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1",
                       "PORTS": tempfile.mkdtemp(dir=self.directory),
                       "SPDF_PLUGINS": self.plugins}
        # A device cannot be used after a fork.
        make = multiprocessing.get_context("spawn") if self.gpu else forks()
        with patch.dict(os.environ, COMMON):
            for rank in range(self.world):
                ours, theirs = make.Pipe()
                self._ends.append(ours)
                self._ranks.append(make.Process(
                    target=_rank_main, args=(self.directory, rank, environment, theirs)))
                self._ranks[-1].start()
                theirs.close()

    def _fail(self, why: str, results: list) -> None:
        codes = [process.exitcode for process in self._ranks]  # None: it has not ended
        said = [result.trace for result in sorted(_failures(results))]
        logs = (self.directory / f"rank{rank}.log" for rank in range(self.world))
        said += [log.read_text()[-3000:] for log in logs if log.exists()]
        raise AssertionError("\n".join([f"{why}; exit codes {codes}", *said]))

    def stop(self) -> None:
        """Ends the ranks; what they returned stays."""
        for end in self._ends:
            end.close()
        for process in self._ranks:
            process.kill()
            process.join()
        self._ranks, self._ends = [], []


def _failures(results: list) -> list[Failure]:
    return [result for result in results if isinstance(result, Failure)]


def _plain(value) -> list | str:
    """What tells a tensor or a function from others."""
    return value.tolist() if hasattr(value, "tolist") else f"{value.__module__}.{value.__name__}"


def _with_output(value, output: str):
    """A copy of nested values, in which every `output` that is None is this one."""
    if isinstance(value, dict):
        return {name: output if name == "output" and inner is None else _with_output(inner, output)
                for name, inner in value.items()}
    return ([_with_output(inner, output) for inner in value]
            if isinstance(value, list | tuple) else value)


@cache
def forks() -> multiprocessing.context.ForkServerContext:
    """Makes processes that are forks of one with the engines in memory, which has no threads and
    sees no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with patch.dict(os.environ, {**COMMON, "CUDA_VISIBLE_DEVICES": ""}):
        forkserver.ensure_running()
    return context


def end_with_tests() -> None:
    """Lets this process, a fork, end with that of the tests, however that ends: the process that
    makes forks does, unless one of them keeps its pipe open, and takes them along."""
    made_by = forkserver._forkserver
    if made_by._forkserver_alive_fd is not None:
        os.close(made_by._forkserver_alive_fd)
        made_by._forkserver_alive_fd = None
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def world_of(recipe: dict) -> int:
    """Ranks of a recipe's layout."""
    layout = recipe.get("parallel", {})
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agree_on_port() -> None:
    """Sets MASTER_PORT anew: every joining of the ranks gets a port of its own, which rank 0 found
    free."""
    global _joined
    _joined += 1
    file = Path(os.environ["PORTS"]) / f"{_joined}.port"
    if os.environ["RANK"] == "0":
        beside = file.with_suffix(".new")
        beside.write_text(str(free_port()))
        beside.replace(file)
    while not file.exists():  # ended by the harness where rank 0 has failed
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = file.read_text()


_joined = 0


def _rank_main(directory: Path, rank: int, environment: dict[str, str],
               end: connection.Connection) -> None:
    """Runs call after call of those that come through `end`, until it is closed."""
    end_with_tests()
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(ROOT)
    log = os.open(directory / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # of data loaders' workers, as in a process of its own
    multiprocessing.set_start_method("fork", force=True)
    import preloaded

    while True:
        try:
            call = end.recv_bytes()
        except EOFError:
            return
        end.send_bytes(pickle.dumps(_result_of(call, preloaded.cases.abandon)))


def _result_of(call: bytes, abandon: Callable) -> object:
    try:
        function, arguments, keywords = pickle.loads(call)
        return function(*arguments, **keywords)
    except Exception:
        failure = Failure(time.monotonic(), traceback.format_exc())
        abandon()
        return failure
