"""Progress of this process: the activity of the run, the last collective it entered, how long
collectives blocked it.

The collectives of `torch.distributed` are wrapped in its namespace, at the price of two clock
readings a call. With that a rank that hangs is named with its last collective (`heartbeat.py`), and
a slow rank is told from those that wait for it (`stragglers.py`).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce",
    "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "batch_isend_irecv",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "recv",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
    "_all_gather_base", "_reduce_scatter_base")  # not isend and irecv: P2POp compares functions


@dataclass
class Progress:
    """Progress of the training thread, which other threads read.

    Attributes:
        activity: current one, in words.
        watched: whether standing still in this activity is a fault; saving to a slow disk is none.
        collective: name of the last one entered; empty: none yet.
        count: number of collectives entered.
        inside: whether the training thread is inside a collective.
        moved: `time.monotonic()` of the last progress.
        blocked_seconds: host time spent inside collectives, and waiting for them.
        measuring: whether to record events on a GPU, for `blocked_on_gpu`.
    """

    activity: str = "setting up"
    watched: bool = False
    collective: str = ""
    count: int = 0
    inside: bool = False
    moved: float = field(default_factory=time.monotonic)
    blocked_seconds: float = 0.0
    measuring: bool = False
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def set_activity(self, activity: str, watched: bool = False) -> None:
        """Marks the start of an activity of the training thread."""
        self.activity, self.watched, self.moved = activity, watched, time.monotonic()

    def blocked_on_gpu(self) -> float:
        """Seconds that the streams of this rank waited for collectives since the last call."""
        torch.cuda.synchronize()  # parameters may still be gathered
        events, self._events = self._events, []
        return sum(before.elapsed_time(after) for before, after in events) / 1e3

    def last_collective(self) -> str:
        """Name and number of the last collective, in words."""
        return f"{self.collective}, number {self.count:,}" if self.collective else "none yet"


PROGRESS = Progress()
_this_thread = threading.local()


def in_background() -> None:
    """Marks the calling thread as background: its collectives are no progress of training."""
    _this_thread.background = True


def instrument_collectives() -> None:
    """Wraps the collectives to update PROGRESS, for the rest of the process.

    It must run before megatron.core is imported, which imports some of them by name.
    """
    if hasattr(dist.all_reduce, "instrumented"):
        return
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, _instrumented(getattr(dist, name), name.removeprefix("_")))
    dist.Work.wait = _instrumented(dist.Work.wait, "")


def _instrumented(function: Callable, name: str) -> Callable:
    """Wraps a collective, or with an empty name the wait for one, to update PROGRESS."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if PROGRESS.inside or getattr(_this_thread, "background", False):
            return function(*args, **kwargs)
        if name:
            PROGRESS.collective, PROGRESS.count = name, PROGRESS.count + 1
        on_gpu = PROGRESS.measuring and torch.cuda.is_available()
        before = _event() if on_gpu else None
        PROGRESS.inside, PROGRESS.moved = True, time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            moved = time.monotonic()
            PROGRESS.blocked_seconds += moved - PROGRESS.moved
            PROGRESS.inside, PROGRESS.moved = False, moved
            if before is not None:
                PROGRESS._events.append((before, _event()))
    call.instrumented = True
    return call


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
