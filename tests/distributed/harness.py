"""Runs cases on real gloo ranks: one group of processes for many cases, forked from a process that
has imported the engines once, since that takes seconds.

    results = run_cases(world=2, cases={"tp2": ("train", {...}), ...}, directory=tmp)
    results["tp2"][rank]  ->  what tests/distributed/cases.py:train returned there, or a `Failure`

A function of another module beside cases.py is named with it: "finetune_cases.finetuned".
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
          "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent),
                                        str(Path(__file__).parents[1] / "seams"),
                                        *filter(None, [os.environ.get("PYTHONPATH")])])}


@dataclass
class Failure:
    """A case that raised on a rank."""

    trace: str


def run_cases(
    world: int, cases: dict[str, tuple[str, dict]], directory: Path, timeout: int = 600,
    gpu: bool = False
) -> dict[str, list]:
    """Runs every case on `world` fresh processes, one case after the other; returns case -> result
    of each rank.

    On CPU, also where there are GPUs, unless `gpu`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cases.pickle").write_bytes(pickle.dumps(cases))
    environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "CASES": str(directory)}
    # a device cannot be used after a fork
    make = multiprocessing.get_context("spawn") if gpu else _forks()
    ranks = [make.Process(target=_rank_main, args=(directory, rank, environment))
             for rank in range(world)]
    with patch.dict(os.environ, COMMON):
        for process in ranks:
            process.start()
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]  # None: it had not ended
    for process in ranks:
        process.kill()
    logs = "\n".join((directory / f"rank{r}.log").read_text()[-3000:] for r in range(world))
    assert not any(codes), f"exit codes {codes}\n{logs}"
    return {name: [pickle.loads((directory / f"{name}.{rank}.pickle").read_bytes())
                   for rank in range(world)]
            for name in cases}


@cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """Makes processes that are forks of one with the engines in memory, which has no threads and
    sees no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with patch.dict(os.environ, {**COMMON, "CUDA_VISIBLE_DEVICES": ""}):
        forkserver.ensure_running()
    return context


def outcome(results: dict[str, list], name: str, rank: int = 0):
    """The result of a case on a rank; fails the test with the trace where the case raised."""
    found = results[name]
    for result in found:
        assert not isinstance(result, Failure), f"case {name}:\n{result.trace}"
    return found[rank]


def free_port() -> int:
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


def _rank_main(directory: Path, rank: int, environment: dict[str, str]) -> None:
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(ROOT)
    log = os.open(directory / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # of data loaders' workers, as in a process of its own
    multiprocessing.set_start_method("fork", force=True)
    import preloaded

    cases = preloaded.cases
    for name, (function,
               arguments) in pickle.loads((directory / "cases.pickle").read_bytes()).items():
        try:
            module, _, name_there = function.rpartition(".")
            result = getattr(importlib.import_module(module or "cases"), name_there)(**arguments)
        except Exception:
            result = Failure(traceback.format_exc())
            cases.abandon()
        (directory / f"{name}.{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))
