"""Runs cases on real gloo ranks: one group of processes for many cases, since importing the engines takes seconds.

    results = run_cases(world=2, cases={"tp2": ("train", {...}), ...}, directory=tmp)
    results["tp2"][rank]  ->  what tests/distributed/cases.py:train returned there, or a `Failure`

A function of another module beside cases.py is named with it: "finetune_cases.finetuned".
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Failure:
    """A case that raised on a rank."""

    trace: str


def run_cases(
    world: int, cases: dict[str, tuple[str, dict]], directory: Path, timeout: int = 600, gpu: bool = False
) -> dict[str, list]:
    """Runs every case on `world` fresh processes, one case after the other; returns case -> result of each rank.

    On CPU, also where there are GPUs, unless `gpu`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cases.pickle").write_bytes(pickle.dumps(cases))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "CASES": str(directory),
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}), "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    ranks = []
    for rank in range(world):
        log = (directory / f"rank{rank}.log").open("w")
        ranks.append(subprocess.Popen(
            [sys.executable, __file__, str(directory)], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
    try:
        codes = [process.wait(timeout) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((directory / f"rank{r}.log").read_text()[-3000:] for r in range(world))
    assert not any(codes), f"exit codes {codes}\n{logs}"
    return {name: [pickle.loads((directory / f"{name}.{rank}.pickle").read_bytes()) for rank in range(world)]
            for name in cases}


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
    """Sets MASTER_PORT anew: every joining of the ranks gets a port of its own, which rank 0 found free."""
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


def _rank_main(directory: Path) -> None:
    from megatron_spdf.parallel import cpu

    cpu.install()
    import cases

    for name, (function, arguments) in pickle.loads((directory / "cases.pickle").read_bytes()).items():
        try:
            module, _, name_there = function.rpartition(".")
            result = getattr(importlib.import_module(module or "cases"), name_there)(**arguments)
        except Exception:
            result = Failure(traceback.format_exc())
            cases.abandon()
        (directory / f"{name}.{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    import harness

    harness._rank_main(Path(sys.argv[1]))
