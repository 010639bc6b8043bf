"""The check at startup: ranks as threads around one store."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_spdf.resilience import startup_check
from megatron_spdf.resilience.startup_check import (
    RankReport,
    Unhealthy,
    check_in,
    render,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def call(monkeypatch):
    """Runs `check_in` on some ranks of a world; returns rank -> what it returned or raised."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    monkeypatch.setattr(startup_check, "REACH_SECONDS", 20.0)

    def call(ranks: list[int], world: int, seconds: float = 60.0) -> dict[int, object]:
        store, found = dist.HashStore(), {}

        def one(rank: int) -> None:
            try:
                found[rank] = check_in(rank, world, store, CPU, seconds)
            except Exception as error:
                found[rank] = error
        threads = [threading.Thread(target=one, args=(rank,), name=f"rank {rank}")
                   for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        return found
    return call


def test_all_there(call):
    found = call([0, 1, 2], 3)
    assert len(set(found.values())) == 1
    assert "rank 0-2, cpu" in found[0] and "clock +0.000 s\nall 3 ranks reported within" in found[0]


@pytest.mark.parametrize(("world", "more"), [(4, ""), (17, ""), (18, " and 1 more"),
                                             (30, " and 13 more")])
def test_sixteen_missing_ranks_are_named_with_their_hosts_and_others_counted(monkeypatch, world,
                                                                             more):
    monkeypatch.setattr(startup_check, "hosts_of_ranks", lambda: {1: "n1", 2: "n2"})
    store = dist.HashStore()
    store.set("report/0", "{}")
    outcome = startup_check._coordinate(world, store, 0.01)
    named = ", ".join(["1 on n1", "2 on n2", *map(str, range(3, min(world, 17)))])
    assert outcome["said"] == "" and outcome["fault"].startswith(
        f"{world - 1} of {world} ranks did not report within fault_tolerance.join_seconds=0.01: "
        f"rank {named}{more}. Look at these nodes")
    assert store.get("addresses") == b"[]"  # which ends the others' wait


@pytest.mark.parametrize(("skew", "said"), [
    (90.0, r"\+(90\.0|8\d\.\d)"), (-90.0, r"-(90\.0|8\d\.\d)"), (1.0, None)])
def test_a_clock_that_is_off_is_measured(call, monkeypatch, skew, said):
    true = time.time

    def of_rank() -> float:
        return true() + (skew if threading.current_thread().name == "rank 2" else 0.0)
    monkeypatch.setattr(startup_check.time, "time", of_rank)
    lines = call([0, 1, 2], 3)[0]
    if said is None:
        assert "warning" not in lines
    else:
        assert re.search(rf"warning: the clock of \S+ is {said} s off that of", lines), lines


@pytest.mark.slow
def test_a_missing_rank_is_named_on_every_rank_with_its_host(call, monkeypatch):
    monkeypatch.setattr(startup_check, "hosts_of_ranks",
                        lambda: {0: "a1", 1: "a1", 2: "a2", 3: "a2"})
    found = call([0, 1, 3], 4, seconds=2.0)
    assert {str(e) for e in found.values()} == {str(found[0])} and isinstance(found[0], Unhealthy)
    assert (
        "1 of 4 ranks did not report within fault_tolerance.join_seconds=2: rank 2 on a2. "
        in str(found[0])
    )
    assert "sbatch --exclude" in str(found[0])


def test_a_neighbor_out_of_reach_is_named(call, monkeypatch):
    reach, asked = startup_check.connect, []

    def first_fails(address, token, seconds):
        asked.append(address)
        if len(asked) == 1:
            raise OSError("No route to host")
        return reach(address, token, seconds)
    monkeypatch.setattr(startup_check, "connect", first_fails)
    found = call([0, 1], 2)
    said = str(found[0])
    assert isinstance(found[1], Unhealthy) and str(found[1]) == said
    assert "cannot reach rank" in said and "(No route to host)" in said
    assert f"port {asked[0][1]} " in said


def test_a_neighbor_is_reached_among_strangers(call, monkeypatch):
    """Who listens is found out from the reports; strangers come before the neighbor does."""
    reach, opened = startup_check.connect, []

    def after_strangers(address, token, seconds):
        for text in [b""] * 100 + [b"not the token\n", b"x" * 5000]:
            opened.append(socket.create_connection(address, timeout=5))
            with contextlib.suppress(OSError):
                opened[-1].sendall(text)
        return reach(address, token, seconds)
    monkeypatch.setattr(startup_check, "connect", after_strangers)
    found = call([0, 1, 2], 3)
    for one in opened:
        one.close()
    assert "all 3 ranks reported" in found[0] and len(set(found.values())) == 1


def test_a_clock_that_is_set_back_during_the_check_is_no_skew(call, monkeypatch):
    true, calls = time.time, []

    def set_back() -> float:
        calls.append(true())
        return calls[-1] - (3600 if len(calls) > 4 else 0)
    monkeypatch.setattr(startup_check.time, "time", set_back)
    assert "warning" not in call([0, 1, 2], 3)[0]


def test_durations_do_not_go_by_the_clock_of_the_day():
    """Only clocks are compared by it; what is measured goes by a clock that is never set."""
    read = {path.name: len(re.findall(r"\btime\(\)|\btime_ns\(\)|CLOCK_REALTIME", text))
            for path in (ROOT / "megatron_spdf").rglob("*.py")
            if "time()" in (text := path.read_text()) or "time_ns()" in text}
    assert {name: count for name, count in read.items() if count} == {"startup_check.py": 2}


def test_a_rank_0_that_is_gone_is_named(call, monkeypatch):
    monkeypatch.setattr(startup_check, "REACH_SECONDS", 0.5)
    found = call([1], 2, seconds=0.5)
    assert isinstance(found[1],
                      Unhealthy) and "rank 0 on 127.0.0.1 does not answer" in str(found[1])


def test_what_is_out_of_the_ordinary_is_said():
    reports = [RankReport(r, f"n{r // 2}", "H100", 2**30 * (30 if r == 3 else 70), ("", 0))
               for r in range(4)]
    text = render(reports, [0.0, 0.0, -7.5, -7.5], (12.0, 3))
    assert "n1: rank 2, 3, H100, 30.0 GiB free, clock -7.500 s\n" in text
    assert "all 4 ranks reported within 12.0 s, rank 3 last" in text
    assert "the clock of n1 is -7.5 s off that of n0" in text
    assert "rank 3 on n1 has 30.0 GiB free, others 70.0" in text
    assert text.count("warning") == 2


@pytest.mark.parametrize(("skew", "free", "warnings"), [
    (2.0, 80, 0), (-2.0, 80, 0), (2.001, 80, 1), (-2.001, 80, 1), (0.0, 79, 1), (2.1, 79, 2)])
def test_clocks_two_seconds_off_and_four_fifths_of_the_memory_are_ordinary(skew, free, warnings):
    reports = [RankReport(r, f"n{r}", "H100", free if r == 2 else 100, ("", 0)) for r in range(3)]
    assert render(reports, [0.0, 0.0, skew], (1.0, 2)).count("warning") == warnings


def test_three_ranks_in_a_row_are_a_span_and_two_are_named():
    said = render([RankReport(r, f"n{max(0, r - 2)}", "cpu", 1, ("", 0)) for r in range(5)],
                  [0.0] * 5, (1.0, 2))
    assert "n0: rank 0-2, " in said and "n1: rank 3, " in said
    said = render([RankReport(r, f"n{r // 2}", "cpu", 1, ("", 0)) for r in range(2)], [0.0] * 2,
                  (1.0, 2))
    assert "n0: rank 0, 1, " in said


@pytest.mark.parametrize(("world", "named"), [
    (9, "rank 1 on n1, 2 on n2, 3 on n3, 4 on n4, 5 on n5, 6 on n6, 7 on n7, 8 on ?, "),
    (10, "7 on n7, 8 on ? and others, ")])
def test_while_ranks_are_missing_eight_of_them_are_named(monkeypatch, capsys, world, named):
    monkeypatch.setattr(startup_check, "SAY_SECONDS", 0.0)
    monkeypatch.setattr(startup_check, "hosts_of_ranks", lambda: {r: f"n{r}" for r in range(8)})
    store = SimpleNamespace(check=lambda keys: keys == ["report/0"])
    waiting, (_, last) = startup_check._await_reports(world, store, 0.2)
    assert waiting == list(range(1, world)) and last == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("waiting for rank 1 on n1") and named in said[0]
    assert said[0].endswith(", 0 s")


def test_a_rank_that_is_not_there_is_waited_for_so_long_and_said_to_be_missing_twice_a_minute(
        monkeypatch, capsys):
    store, now = SimpleNamespace(check=lambda keys: False), [0.0]
    monkeypatch.setattr(startup_check, "time", SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)))
    waiting, _ = startup_check._await_reports(2, store, 100.0)
    assert waiting == [0, 1] and 100.0 <= now[0] < 100.1
    assert [line.split(", ")[-1] for line in capsys.readouterr().err.splitlines()] == [
        "30 s", "60 s", "90 s"]


def test_a_rank_reports_its_device_and_the_memory_that_is_free(monkeypatch):
    monkeypatch.setattr(startup_check.torch.cuda, "get_device_name",
                        lambda device: f"H100 {device}")
    monkeypatch.setattr(startup_check.torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert startup_check._device(torch.device("cuda", 1)) == ("H100 cuda:1", 7)
    name, free = startup_check._device(torch.device("cpu"))
    assert name == "cpu" and free > 0
