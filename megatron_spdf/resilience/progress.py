"""What this process is doing: the activity of the run, the last collective it entered, how long
collectives blocked it.

The collectives of `torch.distributed` are wrapped where callers look them up, at the price of two
clock readings a call, so that a rank that hangs can be named with what it did last
(`heartbeat.py`), and a slow one told from those that wait for it (`training/stragglers.py`).
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
    "all_reduce_coalesced", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list",
    "gather",
    "gather_object", "monitored_barrier", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter",
    # not isend and irecv: P2POp takes PyTorch's own alone
    "send", "_all_gather_base", "_reduce_scatter_base")


@dataclass
class Activity:
    """Of the training thread; other threads read it.

    Attributes:
        activity: of the run, in words.
        watched: whether standing still in this activity is a fault; a slow disk is none.
        collective: name of the last one entered; empty: none yet.
        count: collectives entered.
        inside: whether the training thread is inside one now.
        moved: time.monotonic() of the last sign of progress.
        blocked_seconds: spent inside collectives, and waiting for them, on CPU.
        measuring: collect on a GPU what `blocked_on_gpu` sums up.
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
        """Notes that the training thread begins an activity."""
        self.activity, self.watched, self.moved = activity, watched, time.monotonic()

    def blocked_on_gpu(self) -> float:
        """Seconds that this rank's streams waited for collectives since the last call."""
        torch.cuda.synchronize()  # parameters may still be gathered
        events, self._events = self._events, []
        return sum(before.elapsed_time(after) for before, after in events) / 1e3

    def last_collective(self) -> str:
        return f"{self.collective}, number {self.count:,}" if self.collective else "none yet"


PROGRESS = Activity()


_here = threading.local()


def in_background() -> None:
    """Says that the thread that calls is none of training's; those are the main one and, on a GPU,
    autograd's."""
    _here.background = True


def instrument_collectives() -> None:
    """Wraps the collectives for the rest of the process, to keep PROGRESS; before megatron.core is
    imported, which takes some of them by name."""
    if hasattr(dist.all_reduce, "observed"):
        return
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, _observed(getattr(dist, name), name.removeprefix("_")))
    dist.Work.wait = _observed(dist.Work.wait, "")


def _observed(function: Callable, name: str) -> Callable:
    """The function, noting where the training thread is; without a name it is a wait for the
    collective before."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if PROGRESS.inside or getattr(_here, "background", False):
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
    call.observed = True
    return call


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
