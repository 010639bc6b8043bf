"""Where the time of an optimizer step goes.

Clocks are set around the engine's parts and the device waits for each, so that a part's seconds are
its own; what would run at the same time then runs one after the other, and the sum is more than a
step takes. Each moment counts for the innermost part: expanding a weight in the forward pass is no
forward. Products, of blocks too, are parts of forward and backward, from which nothing separates
them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

import torch

from benchmarks.engines import synthetic_batch
from megatron_spdf.kernels import dispatch
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.tables import MILLISECONDS, Column, Table

REST = "zeroing gradients, agreeing, and the rest"
OPTIMIZER = "optimizer, with norm and clipping"
PARTS = ("forward", "backward", "expand", "compress", OPTIMIZER, "communication", REST)
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "_all_gather_base",
               "_reduce_scatter_base", "broadcast", "batch_isend_irecv")


class Clock:
    """Books every moment on the innermost of the parts that are open."""

    def __init__(self, synchronize: Callable[[], None],
                 now: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronize, self._now = synchronize, now
        self._open: list[str] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, whose time is the part's."""
        @wraps(function)
        def run(*arguments, **keywords):
            self._book()
            self._open.append(part)
            try:
                result = function(*arguments, **keywords)
                if part == "communication" and hasattr(result, "wait"):
                    result.wait()  # one that was started to run behind something
                return result
            finally:
                self._book()
                self._open.pop()
        return run

    def _book(self) -> None:
        self._synchronize()
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def measure_parts(recipe: Recipe, engine, numbers: range) -> dict[str, float]:
    """Mean seconds of each part of some steps: part -> seconds.

    Args:
        engine: of the recipe, warmed up.
        numbers: of the steps.
    """
    clock = Clock(torch.cuda.synchronize)
    with _clocks_set(clock, engine):
        step = clock.timed(REST, engine.step)
        for number in numbers:
            step(synthetic_batch(recipe, number), number, number * recipe.tokens_per_step, False)
    return {part: clock.seconds.get(part, 0.0) / len(numbers) for part in PARTS}


@contextmanager
def _clocks_set(clock: Clock, engine) -> Iterator[None]:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import layers

    places = [(schedules, "forward_step", "forward"), (schedules, "backward_step", "backward"),
              (dispatch, "expand", "expand"), (dispatch, "compress", "compress"),
              (layers, "dist_all_gather_func", "communication"),
              (layers, "dist_reduce_scatter_func", "communication")]
    for call, part in engine.timed.items():
        owner, _, name = call.rpartition(".")
        places.append((getattr(engine, owner) if owner else engine, name,
                       OPTIMIZER if part == "optimizer" else part))
    places += [(torch.distributed, name, "communication") for name in COLLECTIVES]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        yield


def render_parts(parts: dict[str, dict[str, float]]) -> list[str]:
    """A table of milliseconds.

    Args:
        parts: name of a run -> part -> seconds.
    """
    columns = [Column("by part", str), *(Column(name, of.get, ".4g", MILLISECONDS)
                                         for name, of in parts.items())]
    return [Table(columns, PARTS).markdown()]
