"""Commands of the project in processes that begin warm: forks of this one, which has imported the
engines once.

Python, PyTorch, Megatron-Core and DeepSpeed take five seconds of a core to import, in every rank,
which is most of what a small run takes. What a command prints goes to a file.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import runpy
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_spdf.files import open_to_append
from megatron_spdf.records.json_reader import parse_json
from megatron_spdf.records.values import Unreadable

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 30.0  # for a run that is asked to save and end
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
_forks = multiprocessing.get_context("fork")


class Failed(Exception):
    """A piece of work that failed."""

    def __init__(self, work: Work, code: int):
        super().__init__(f"exit code {code}")
        self.work, self.code = work, code


@dataclass
class Work:
    """Something that runs in processes of its own.

    Attributes:
        line: the command as a user would type it, for the log.
        call: what each process does; returns an exit code.
        log: file that its output is appended to.
        ranks: number of processes, which find each other as under torchrun where they are several.
        share: how much of it is done, in [0, 1].
    """

    line: str
    call: Callable[[], int | None]
    log: Path
    ranks: int = 1
    share: Callable[[], float] = lambda: 0.0
    _running: list = field(default_factory=list)

    def start(self) -> None:
        """Starts its processes."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(self.log) as log:
            log.write(f"$ {self.line}\n".encode())
        port, self._running = free_port(), []
        for rank in range(self.ranks):
            process = _forks.Process(target=_in_fork, args=(self, rank, port))
            process.start()
            self._running.append(process)

    def ended(self) -> bool:
        """True if all of its processes have ended well.

        Raises:
            Failed: one has not; the others are stopped.
        """
        codes = [process.exitcode for process in self._running]
        if bad := [code for code in codes if code]:
            self.stop()
            raise Failed(self, bad[0])
        return None not in codes

    def stop(self) -> None:
        """Ends its processes; a run saves a checkpoint first."""
        for process in self._running:
            process.terminate()
        until = time.monotonic() + PATIENCE_SECONDS
        for process in self._running:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()


def import_engines() -> None:
    """Imports what the ranks of a training need and the tools of its end, once for all."""
    from megatron_spdf.parallel import fake_cuda

    fake_cuda.install()
    for name in ("megatron_spdf.engine.megatron", "megatron_spdf.engine.deepspeed",
                 "megatron_spdf.training.loop", "megatron_spdf.training.finetune_setup",
                 "megatron_spdf.checkpoint.checkpointer",
                 "megatron_spdf.data.pretraining.dataset", "megatron_spdf.evaluation.evaluate",
                 "megatron_spdf.evaluation.sampling", "transformers.models.gpt2.modeling_gpt2"):
        importlib.import_module(name)
    gc.freeze()  # so that ranks that collect garbage need not go through the libraries


def command(words: Sequence[object], log: Path, ranks: int = 1,
            share: Callable[[], float] = lambda: 0.0) -> Work:
    """A script of the project with its arguments, on some ranks.

    Args:
        words: path of the script below the root, and its arguments.
    """
    script, *rest = map(str, words)
    launcher = f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python"
    shown = shlex.join(word.removeprefix(f"{ROOT}/") for word in (script, *rest))
    return Work(f"{launcher} {shown}", partial(_run, script, rest), log,
                ranks, share)


def in_order(works: Sequence[Work]) -> Work:
    """Several works as one, of one process, up to the first that fails; the first one's log has
    all."""
    def call() -> int:
        for number, work in enumerate(works):
            if number:
                print(f"$ {work.line}")
            if code := work.call():
                return code
        return 0
    return Work(works[0].line, call, works[0].log)


def steps_done(run: Path, steps: int) -> float:
    """Share of a training run that its log has come to."""
    with suppress(OSError, Unreadable):
        lines = (run / "log.jsonl").read_bytes().splitlines()
        reached = [parse_json(line).get("step", 0) for line in lines[-2:]]
        return min(1.0, max(reached, default=0) / steps)
    return 0.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(script: str, words: list[str]) -> int:
    """The course of an interpreter that is given a script; returns its exit code."""
    path = str(ROOT / script)
    sys.argv = [path, *words]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _in_fork(work: Work, rank: int, port: int) -> None:
    """One process of some work, with its output, environment and signals."""
    os.setpgid(0, 0)  # an interrupt of the terminal is for the demo, which stops its work in order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError, AttributeError):  # of systems that are not Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    with open_to_append(work.log) as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1, "utf-8", "backslashreplace")
                              for descriptor in (1, 2))
    if work.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work.ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = work.call()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
