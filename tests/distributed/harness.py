"""Runs cases on real gloo ranks. A case runs when an assertion first asks for it.

    results = run_cases(world=2, cases={"tp2": ("train", {...}), ...}, directory=tmp)
    outcome(results, "tp2", rank=1)  ->  what tests/distributed/cases.py:train returned there

The ranks of a world are forks of a process that has imported the engines once, since that takes
seconds. They start with the first case and stay warm for the others, until the test file ends. So
`pytest -k one` runs the one case that it needs. A function of another module beside cases.py is
named with it: "finetune_cases.finetuned". A case that reads what others wrote names them as a third
entry: ("resumed", {...}, ["saved"]).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
          "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent),
                                        str(Path(__file__).parents[1] / "seams"),
                                        *filter(None, [os.environ.get("PYTHONPATH")])])}
STARTED: list[Results] = []  # whose ranks may be running; `stop_ranks` ends them


@dataclass
class Failure:
    """A case that raised on a rank."""

    trace: str


class Results(Mapping):
    """Case -> what it returned on each rank, or a `Failure`; runs a case when it is first read.

    Args:
        world: number of ranks.
        cases: name -> (function, arguments) or (function, arguments, cases that go before).
        directory: for logs of the ranks.
        timeout: seconds that a case may take.
        gpu: let the ranks see a GPU.
    """

    def __init__(self, world: int, cases: dict[str, tuple], directory: Path, timeout: int,
                 gpu: bool):
        self.world, self.cases, self.directory = world, cases, directory
        self.timeout, self.gpu = timeout, gpu
        self._found: dict[str, list] = {}
        self._ranks: list[multiprocessing.Process] = []
        self._ends: list[connection.Connection] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self.cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, name: str) -> list:
        if name not in self._found:
            function, arguments, *before = self.cases[name]
            for other in before[0] if before else ():
                _ = self[other]
            self._found[name] = self._run(function, arguments)
        return self._found[name]

    def _run(self, function: str, arguments: dict) -> list:
        if not self._ranks:
            self._start()
        for end in self._ends:
            end.send_bytes(pickle.dumps((function, arguments)))
        waiting, deadline = dict(enumerate(self._ends)), time.monotonic() + self.timeout
        results: list = [None] * self.world
        while waiting:
            ready = connection.wait(waiting.values(), max(0.0, deadline - time.monotonic()))
            for rank in [r for r, end in waiting.items() if end in ready]:
                try:
                    results[rank] = pickle.loads(waiting.pop(rank).recv_bytes())
                except EOFError:
                    self._fail(f"rank {rank} died")
            if not ready:
                self._fail(f"ranks {list(waiting)} were not done after {self.timeout} s")
        return results

    def _start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        environment = {"WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1",
                       "CASES": str(self.directory)}
        # A device cannot be used after a fork.
        make = multiprocessing.get_context("spawn") if self.gpu else _forks()
        STARTED.append(self)
        with patch.dict(os.environ, COMMON):
            for rank in range(self.world):
                ours, theirs = make.Pipe()
                self._ends.append(ours)
                self._ranks.append(make.Process(
                    target=_rank_main, args=(self.directory, rank, environment, theirs)))
                self._ranks[-1].start()
                theirs.close()

    def _fail(self, why: str) -> None:
        codes = [process.exitcode for process in self._ranks]  # None: it has not ended
        self.stop()
        logs = "\n".join((self.directory / f"rank{r}.log").read_text()[-3000:]
                         for r in range(self.world))
        raise AssertionError(f"{why}; exit codes {codes}\n{logs}")

    def stop(self) -> None:
        """Ends the ranks; results that are there stay."""
        for end in self._ends:
            end.close()
        for process in self._ranks:
            process.kill()
            process.join()
        self._ranks, self._ends = [], []


def run_cases(world: int, cases: dict[str, tuple], directory: Path, timeout: int = 600,
              gpu: bool = False) -> Results:
    """Cases for `world` ranks, on CPU unless `gpu`; see `Results`."""
    return Results(world, cases, directory, timeout, gpu)


def stop_ranks() -> None:
    """Ends all ranks that were started."""
    while STARTED:
        STARTED.pop().stop()


@cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """Makes processes that are forks of one with the engines in memory, which has no threads and
    sees no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with patch.dict(os.environ, {**COMMON, "CUDA_VISIBLE_DEVICES": ""}):
        forkserver.ensure_running()
    return context


def outcome(results: Mapping[str, list], name: str, rank: int = 0):
    """Returns what a case gave on a rank; fails the test with the trace where the case raised."""
    found = results[name]
    for result in found:
        assert not isinstance(result, Failure), f"case {name}:\n{result.trace}"
    return found[rank]


class Outcomes(dict):
    """Case -> what it gave on rank 0, of results that run when they are first asked for."""

    def __init__(self, results: Mapping[str, list]):
        self.results = results

    def __missing__(self, name: str):
        self[name] = outcome(self.results, name)
        return self[name]


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
    file = Path(os.environ["CASES"]) / f"{_joined}.port"
    if os.environ["RANK"] == "0":
        beside = file.with_suffix(".new")
        beside.write_text(str(free_port()))
        beside.replace(file)
    while not file.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = file.read_text()


_joined = 0


def _rank_main(directory: Path, rank: int, environment: dict[str, str],
               end: connection.Connection) -> None:
    """Runs case after case of those that come through `end`, until it is closed."""
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
            function, arguments = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        end.send_bytes(pickle.dumps(_result_of(function, arguments, preloaded.cases.abandon)))


def _result_of(function: str, arguments: dict, abandon) -> object:
    module, _, name = function.rpartition(".")
    try:
        return getattr(importlib.import_module(module or "cases"), name)(**arguments)
    except Exception:
        abandon()
        return Failure(traceback.format_exc())
