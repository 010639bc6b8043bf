"""Who is slow, where collectives make all ranks take the same time."""

from __future__ import annotations

import threading
import time

import torch
import torch.distributed as dist

from megatron_spdf.resilience.progress import PROGRESS, _instrumented, in_background
from megatron_spdf.resilience.stragglers import OwnTime, slower


def times(*seconds: float) -> list[OwnTime]:
    return [OwnTime(rank, f"n{rank}", s, 0.0) for rank, s in enumerate(seconds)]


def test_ranks_over_the_median_by_the_factor_slowest_first():
    assert [t.rank for t in slower(times(1.0, 1.4, 1.0, 2.0, 1.05), 1.3)] == [3, 1]
    assert slower(times(1.0, 1.2, 1.1), 1.3) == []
    assert [t.rank for t in slower(times(1.0, 2.0), 1.3)] == [1]
    assert [t.rank for t in slower(times(1.0, 1.5), 1.3)] == [1]  # not of their mean, 1.25
    assert [t.rank for t in slower(times(1.6, 1.0, 1.2, 1.7), 1.3)] == [3, 0]


def test_half_the_ranks_may_be_slow():
    assert [t.rank for t in slower(times(1.0, 3.0, 1.0, 3.0), 1.3)] == [1, 3]


def test_time_in_collectives_is_not_a_ranks_own():
    wait = _instrumented(lambda seconds: time.sleep(seconds), "all_reduce")
    before, count = PROGRESS.blocked_seconds, PROGRESS.count
    wait(0.05)
    assert PROGRESS.blocked_seconds - before >= 0.05
    assert (
        PROGRESS.collective == "all_reduce" and PROGRESS.count == count + 1 and not PROGRESS.inside
    )


def test_autograds_thread_is_instrumented_and_one_that_saves_is_not():
    """On a GPU collectives of the backward pass are entered by a thread of autograd's."""
    observed, counts = _instrumented(torch.ones, "all_reduce"), [PROGRESS.count]
    for first in (lambda: None, in_background):
        thread = threading.Thread(target=lambda first=first: (first(), observed(1)))
        thread.start()
        thread.join()
        counts.append(PROGRESS.count - counts[0])
    assert counts[1:] == [1, 1]


def test_collectives_of_every_version_are_known():
    from megatron_spdf.resilience.progress import COLLECTIVES

    missing = [name for name in COLLECTIVES if not hasattr(dist, name)]
    assert set(missing) <= {"all_reduce_coalesced", "monitored_barrier", "_all_gather_base",
                            "_reduce_scatter_base"}
