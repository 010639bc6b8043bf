"""Calls of tools/experiment.py, one after the other, whose runs are forks of one process that has
imported the engines.

    python tests/cli/forked_grid.py '[[STOP, "GRID.yaml", "WORD"], ...]'

STOP is a step after which the first run of the call gets SIGTERM; 0: none. The last line has the
exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from forked_ranks import fork, free_port, load  # noqa: E402

PRETRAIN = load("pretrain")  # before all that imports an engine
import experiment  # noqa: E402

from megatron_spdf.runs import grid  # noqa: E402
from megatron_spdf.training.loop import Trainer  # noqa: E402

STOPS: list[int] = []  # of the runs to come


def exit_code(words: list[str], *_, **__) -> int:
    """Exit code of the command line of a run, whose time is never over."""
    pid = fork(PRETRAIN, words[2:], 0, 1, free_port())
    STOPS.clear()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_due(self: Trainer, inner=Trainer._save_due) -> bool:
    if self.state.step in STOPS:
        os.kill(os.getpid(), signal.SIGTERM)
    return inner(self)


class InThisThread(nullcontext):
    """Executor without threads: the stand-in for CUDA is of the thread that installed it."""

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done

    def __enter__(self):
        return self


Trainer._save_due = save_due
grid.ThreadPoolExecutor = InThisThread
grid._exit_code = exit_code
codes = []
for stop, *words in json.loads(sys.argv[1]):
    STOPS[:] = [stop]
    sys.argv[1:] = words
    codes.append(experiment.main())
print(json.dumps(codes))
