"""Which rank is slow, where collectives make all of them take the same time.

A rank's own time of a step is its wall time less what it spent in collectives, waiting for others
or sending: on CPU by the clock, on a GPU by events in its stream. Ranks whose own time is over the
median are those the others wait for.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_spdf.resilience.progress import PROGRESS

WINDOW = 5  # steps before a gather that are measured


class Log(Protocol):
    """The log of a run, `runs.run_log.RunLog`."""

    def record(self, kind: str, step: int, **figures: Any) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class OwnTime:
    """Seconds per step that a rank spent on its own work, and those of them on fetching data."""

    rank: int
    host: str
    seconds: float
    data_seconds: float


class Stragglers:
    """Measures this rank's own step time, and gathers everyone's.

    Args:
        every: steps between gathers; 0: never.
        factor: over the median, from which a rank is named.
    """

    def __init__(self, every: int, factor: float, log: Log):
        self.every = every if dist.get_world_size() > 1 else 0
        self.factor, self.log = factor, log
        self._seconds: list[float] = []
        self._data_seconds: list[float] = []
        self._started = self._blocked = 0.0

    def begin(self, step: int) -> None:
        """Before a step fetches its data."""
        PROGRESS.measuring = bool(self.every) and (-step) % self.every < WINDOW
        self._started, self._blocked = time.perf_counter(), PROGRESS.blocked_seconds

    def end(self, step: int, data_seconds: float) -> None:
        """After a step, whose results the host has seen; where it is due, all ranks gather their
        times."""
        if not PROGRESS.measuring:
            return
        wall = time.perf_counter() - self._started
        blocked = (
            PROGRESS.blocked_on_gpu()
            if torch.cuda.is_available()
            else PROGRESS.blocked_seconds - self._blocked
        )
        self._seconds.append(max(0.0, wall - blocked))
        self._data_seconds.append(data_seconds)
        if step % self.every == 0:
            self._gather(step)

    def _gather(self, step: int) -> None:
        mine = OwnTime(dist.get_rank(), socket.gethostname(), statistics.median(self._seconds),
                       statistics.median(self._data_seconds))
        self._seconds, self._data_seconds = [], []
        times: list[OwnTime] = [mine] * dist.get_world_size()
        dist.all_gather_object(times, mine)
        slow = slower(times, self.factor)
        usual = statistics.median_low(t.seconds for t in times)
        self.log.record("ranks", step, own_seconds_median=usual,
                        own_seconds_max=max(t.seconds for t in times), slow_ranks=len(slow),
                        own_seconds={str(t.rank): t.seconds for t in slow})
        for t in slow:
            self.log.say(f"step {step}: rank {t.rank} on {t.host} is slow, {t.seconds:.3g} s of "
                         f"its own per step against {usual:.3g} s of the median rank; "
                         f"{t.data_seconds:.3g} s of it for data")


def slower(times: Sequence[OwnTime], factor: float) -> list[OwnTime]:
    """Those over the median by the factor, slowest first. The lower of two middle values counts as
    the median, so that of two ranks one can be slow."""
    usual = statistics.median_low(t.seconds for t in times)
    return sorted((t for t in times if t.seconds > factor * usual), key=lambda t: -t.seconds)
