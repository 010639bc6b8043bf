"""Detection of slow ranks, where collectives make the steps of all ranks equally long.

The own time of a rank is the wall time of a step less the time in collectives, waiting or sending:
on CPU by the clock, on a GPU by events in its stream. The others wait for ranks whose own time is
over the median.
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

WINDOW = 5  # measured steps before a gather


class LogWriter(Protocol):
    """Log of a run, see `runs.run_log.RunLog`."""

    def record(self, kind: str, step: int, **figures: Any) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class OwnTime:
    """Seconds per step that a rank spent on its own work, and the part of them spent on fetching
    data."""

    rank: int
    host: str
    seconds: float
    data_seconds: float


class Stragglers:
    """Measures the own time of this rank, and logs the ranks that are slow.

    Args:
        every: steps between gathers; 0: never.
        factor: own time over the median, above which a rank is named.
        log: of the run.
    """

    def __init__(self, every: int, factor: float, log: LogWriter):
        self.every = every if dist.get_world_size() > 1 else 0
        self.factor, self.log = factor, log
        self._seconds: list[float] = []
        self._data_seconds: list[float] = []
        self._started = self._blocked = 0.0

    def begin(self, step: int) -> None:
        """Starts the clock, before a step fetches its data."""
        PROGRESS.measuring = bool(self.every) and (-step) % self.every < WINDOW
        self._started, self._blocked = time.perf_counter(), PROGRESS.blocked_seconds

    def end(self, step: int, data_seconds: float) -> None:
        """Stops the clock, after the host has read the results of a step. All ranks gather their
        times when that is due."""
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
    """Ranks whose time is over the median by the factor, slowest first.

    Of two middle values the lower is the median, so that one of two ranks can be slow.
    """
    usual = statistics.median_low(t.seconds for t in times)
    return sorted((t for t in times if t.seconds > factor * usual), key=lambda t: -t.seconds)
