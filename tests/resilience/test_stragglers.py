"""Who is slow, where collectives make all ranks take the same time."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_spdf.resilience import stragglers
from megatron_spdf.resilience.progress import PROGRESS, Progress, _instrumented, in_background
from megatron_spdf.resilience.stragglers import OwnTime, slower


def times(*seconds: float) -> list[OwnTime]:
    return [OwnTime(rank, f"n{rank}", s, 0.0) for rank, s in enumerate(seconds)]


def test_ranks_over_the_median_by_the_factor_slowest_first():
    assert [t.rank for t in slower(times(1.0, 1.4, 1.0, 2.0, 1.05), 1.3)] == [3, 1]
    assert slower(times(1.0, 1.2, 1.1), 1.3) == []
    assert [t.rank for t in slower(times(1.0, 2.0), 1.3)] == [1]
    assert [t.rank for t in slower(times(1.0, 1.5), 1.3)] == [1]  # not of their mean, 1.25
    assert [t.rank for t in slower(times(1.6, 1.0, 1.2, 1.7), 1.3)] == [3, 0]
    assert slower(times(1.0, 1.5), 1.5) == []  # by more than the factor


class Log:
    def __init__(self):
        self.records, self.said = [], []

    def record(self, kind: str, step: int, **figures) -> None:
        self.records.append((kind, step, figures))

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def ranks(monkeypatch):
    """Makes this process rank 0 of some, and gives what the others report."""
    def make(*others: OwnTime):
        def gather(there: list, mine: OwnTime) -> None:
            there[:] = [mine, *others]

        monkeypatch.setattr(stragglers.dist, "get_world_size", lambda: 1 + len(others))
        monkeypatch.setattr(stragglers.dist, "get_rank", lambda: 0)
        monkeypatch.setattr(stragglers.dist, "all_gather_object", gather)
    return make


def test_a_rank_reports_the_median_of_its_last_steps_without_its_waits(ranks, monkeypatch):
    """Of ten steps the last five count. A step of n takes n + 2 seconds, two of them in
    collectives, and reads data for n / 10."""
    ranks(OwnTime(1, "n1", 4.0, 0.5), OwnTime(2, "n2", 11.0, 9.0))
    clock = [100.0]
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(PROGRESS, "blocked_seconds", 50.0)
    monkeypatch.setattr(PROGRESS, "measuring", False)
    log, measured = Log(), []
    pace = stragglers.Stragglers(10, 1.3, log)
    for step in range(1, 21):
        pace.begin(step)
        measured.append(PROGRESS.measuring)
        clock[0] += step + 2
        PROGRESS.blocked_seconds += 2
        pace.end(step, step / 10)
    assert measured == ([False] * 5 + [True] * 5) * 2
    assert [(kind, step) for kind, step, _ in log.records] == [("ranks", 10), ("ranks", 20)]
    first, second = (figures for *_, figures in log.records)
    assert first == {"own_seconds_median": 8.0, "own_seconds_max": 11.0, "slow_ranks": 1,
                     "own_seconds": {"2": 11.0}}
    assert second == {"own_seconds_median": 11.0, "own_seconds_max": 18.0, "slow_ranks": 1,
                      "own_seconds": {"0": 18.0}}
    assert log.said == [
        "step 10: rank 2 on n2 is slow, 11 s of its own per step against 8 s of the median rank; "
        "9 s of it for data",
        f"step 20: rank 0 on {socket.gethostname()} is slow, 18 s of its own per step against 11 s "
        "of the median rank; 1.8 s of it for data"]


@pytest.mark.parametrize(("every", "others"), [(0, 1), (10, 0)])
def test_nothing_is_measured_where_nothing_is_asked_for_or_a_rank_is_alone(ranks, monkeypatch,
                                                                           every, others):
    ranks(*times(*[1.0] * others))
    monkeypatch.setattr(PROGRESS, "measuring", True)
    pace = stragglers.Stragglers(every, 1.3, Log())
    for step in range(1, 21):
        pace.begin(step)
        assert not PROGRESS.measuring
        pace.end(step, 0.0)
    assert pace.log.records == []


def test_a_process_that_sets_up_is_not_watched():
    fresh = Progress()
    assert (fresh.activity, fresh.watched, fresh.inside, fresh.measuring) == ("setting up", False,
                                                                             False, False)
    assert fresh.last_collective() == "none yet"
    fresh.collective, fresh.count = "all_reduce", 1234
    assert fresh.last_collective() == "all_reduce, number 1,234"


@pytest.mark.parametrize("watched", [True, False])
def test_an_activity_begins_now(watched):
    made = Progress(moved=-1000.0)
    before = time.monotonic()
    made.set_activity("the save", watched)
    assert (made.activity, made.watched) == ("the save", watched) and made.moved >= before


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
