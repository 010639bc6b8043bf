"""While a run is on, the rank that dies, hangs or fails is named, and nobody waits for it for
ever."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from megatron_spdf.resilience import heartbeat
from megatron_spdf.resilience.heartbeat import Beat, Peer, diagnose
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.resilience.world import Ranks

CASES = [f"{deed} {rank}" for deed in ("early", "kill", "stop", "raise", "stand")
         for rank in (0, 2)]
CASES += ["refuse 0", "refuse 2", "leave 0", "pause 0", "pause 2", "suspend 0", "wake 2"]
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """case -> exit codes by rank and what was said."""
    script = Path(__file__).with_name("heartbeat_ranks.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script),
                           str(tmp_path_factory.mktemp("beats")), *CASES],
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {f["case"]: (f["codes"], f["said"]) for f in found}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("deed", "said"), [
    ("early", "died in setting up"),
    ("kill", "died in step"),
    ("stop", "has been silent for"),
    ("raise", "ZeroDivisionError: a batch of nothing"),
    ("stand", "has stood still for")])
def test_the_rank_at_fault_is_named_and_all_end(ended, deed, said, rank):
    codes, text = ended[f"{deed} {rank}"]
    others = [c for r, c in enumerate(codes) if r != rank]
    assert others == [4, 4], text
    faults = [line for line in text.splitlines() if line.startswith("the run ends")]
    assert faults and all(f": rank {rank} on {HOST} " in v or "rank 0 on 127.0.0.1" in v
                            for v in faults), text
    assert any(said in v for v in faults), text
    if deed == "stand":
        assert "others wait for it" in text


@pytest.mark.slow
@pytest.mark.parametrize("case", ["refuse 0", "refuse 2"])
def test_an_error_with_an_exit_code_ends_all_ranks_with_that(ended, case):
    codes, text = ended[case]
    assert codes == [2, 2, 2], text
    assert "IndexError: no such token" in text and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("case", ["leave 0", "pause 0", "pause 2", "suspend 0"])
def test_ranks_that_leave_or_are_stopped_for_a_while_are_not_missed(ended, case):
    codes, text = ended[case]
    assert codes == [0, 0, 0] and "the run ends" not in text


@pytest.mark.slow
def test_a_rank_that_wakes_after_the_end_does_not_accuse_another(ended):
    codes, text = ended["wake 2"]
    assert codes == [4, 4, 4]
    assert all(f": rank 2 on {HOST} has been silent" in line for line in text.splitlines()
               if line.startswith("the run ends"))


def peer(rank: int, heard: float = 0.0, closed: bool = False, trouble: float | None = None,
         **beat) -> Peer:
    return Peer(Beat(rank, f"n{rank}", "step 7", "all_reduce, number 3", **beat), heard, closed,
                trouble)


def test_nothing_is_said_of_healthy_ranks():
    assert diagnose([peer(0), peer(1, heard=-4.0), peer(2, still=4.0)], 0.0, 5.0).said == ""
    assert diagnose([peer(0), peer(1, closed=True, leaving=True)], 100.0, 500.0).said == ""


def test_a_rank_may_be_silent_or_stand_still_for_as_long_as_the_recipe_says():
    assert diagnose([peer(0), peer(1, heard=-5.0)], 0.0, 5.0).said == ""
    assert diagnose([peer(0, still=6.0), peer(1, still=5.0)], 0.0, 5.0).said == ""
    assert diagnose([peer(0), peer(1, heard=-5.01)], 0.0, 5.0).said
    assert diagnose([peer(0, still=6.0), peer(1, still=5.01)], 0.0, 5.0).said


@pytest.fixture
def clocked(monkeypatch):
    """A heartbeat of a rank in step 7 since 100 s, the clock that it reads, and what ends it."""
    clock, ended = [100.0], []
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(heartbeat.progress, "PROGRESS", SimpleNamespace(
        activity="step 7", watched=True, inside=False, moved=100.0, last_collective=lambda: "-"))

    def make(rank: int) -> heartbeat.Heartbeat:
        made = heartbeat.Heartbeat(Ranks(rank, 2, rank, "test"), HashStore(), seconds=5.0)
        made._end = lambda fault: ended.append(fault.said)
        return made
    return make, clock, ended


def test_a_rank_that_was_stopped_with_its_job_accuses_nobody(clocked):
    make, clock, ended = clocked
    one, head = make(1), make(0)
    answers = SimpleNamespace(head=Beat(0, "n0"), heard=100.0, fault="", code=4)
    quiet = SimpleNamespace(read=lambda _: [], listener=SimpleNamespace(broadcast=lambda _: None))
    peers = [peer(0, heard=100.0), peer(1, heard=100.0)]
    for now, still in ((101.0, 1.0), (1101.0, 0.0), (1103.0, 2.0)):
        clock[0] = now
        assert one._beat().still == still
        one._heed(answers)
        head._round(quiet, peers)
        assert not ended
    for now in (1105.0, 1106.1):  # five seconds after it woke
        clock[0] = now
        head._round(quiet, peers)
    assert len(ended) == 1 and ended[0].startswith("rank 1 on n1 has been silent for 5 s")
    grace = 2 * heartbeat.GRACE_SECONDS
    for late in (3.9, 5.0, 5.0 + grace / 2, 5.0 + grace, 5.1 + grace):
        clock[0] = 1101.0 + late
        one._beat()
        one._heed(answers)
        assert len(ended) == 1 + (late > 5.0 + grace)
    assert ended[1].startswith("rank 0 on n0 has been silent for")


def test_nor_one_that_was_stopped_between_two_looks_at_the_clock(clocked):
    """Rank 0 reads most of the time, and others wait."""
    make, clock, ended = clocked
    one, head = make(1), make(0)
    one._beat()
    clock[0] = 1100.0
    one._heed(SimpleNamespace(head=Beat(0, "n0"), heard=100.0, fault="", code=4))
    clock[0] = 100.0
    stopped = SimpleNamespace(read=lambda _: clock.insert(0, 1100.0) or [],
                              listener=SimpleNamespace(broadcast=lambda _: None))
    head._round(stopped, [peer(0, heard=100.0), peer(1, heard=100.0)])
    assert not ended


def test_a_cause_may_be_known_two_seconds_later():
    peers = [peer(0), peer(1, closed=True, trouble=0.0)]
    assert diagnose(peers, 2.0, 50.0).said == "" and diagnose(peers, 2.01, 50.0).said


def test_who_is_silent_is_named_and_neither_who_left_nor_who_died():
    peers = [peer(0, heard=99.0), peer(1, heard=0.0, leaving=True), peer(2, heard=0.0, closed=True,
                                                                         trouble=99.0)]
    assert diagnose(peers, 100.0, 5.0).said == ""  # of the dead one more may be heard
    assert diagnose([*peers, peer(3, heard=0.0)], 100.0, 5.0).said.startswith(
        "rank 3 on n3 has been silent for 100 s")
    assert "rank 1" not in diagnose([*peers, peer(3, heard=0.0)], 100.0, 5.0).said


def test_who_leaves_and_closes_its_connection_has_not_died():
    peers = [peer(0, heard=99.0), peer(1, closed=True, trouble=0.0, leaving=True)]
    assert diagnose(peers, 100.0, 5.0).said == ""


def test_a_death_explains_the_failures_that_follow_it():
    peers = [peer(0, trouble=0.0, failed="RuntimeError: Connection closed by peer"),
             peer(1, trouble=0.5, closed=True)]
    assert diagnose(peers, 2.0, 5.0).said == ""  # the death of another may be heard of later
    assert diagnose(peers, 4.0, 5.0).said.startswith("rank 1 on n1 died in step 7")


def test_the_first_failure_is_named():
    peers = [peer(0, trouble=2.0, failed="RuntimeError: Connection closed"),
             peer(1, trouble=1.0, failed="MemoryError: ")]
    assert diagnose(peers, 9.0, 50.0).said.startswith(
        "rank 1 on n1 failed in step 7; its last collective")


def test_the_exit_code_is_that_of_the_first_failure_unless_a_rank_has_died():
    peers = [peer(0, trouble=2.0, failed="NoToken: ", code=2),
             peer(1, trouble=1.0, failed="MemoryError: "),
             peer(2, trouble=3.0, failed="NoToken: ", code=2)]
    assert diagnose(peers, 9.0, 50.0).code == 4
    assert diagnose([peers[0], peers[2]], 9.0, 50.0).code == 2
    assert diagnose([peers[0], peer(1, trouble=2.5, closed=True)], 9.0, 50.0).code == 4
    assert diagnose([peer(0), peer(1, heard=-60.0)], 0.0, 50.0).code == 4


def test_who_is_outside_of_collectives_holds_up_the_others():
    peers = [peer(0, still=9.0, inside=True), peer(1, still=8.0), peer(2, still=9.5, inside=True)]
    assert diagnose(peers, 0.0, 5.0).said.startswith("rank 1 on n1 has stood still for 8 s")
    assert diagnose([peer(0, still=9.0, inside=True), peer(1, still=2.0)], 0.0, 5.0).said == ""


def test_all_inside_of_collectives_the_one_that_stopped_first_is_named():
    peers = [peer(0, still=9.0, inside=True), peer(1, still=9.5, inside=True)]
    assert diagnose(peers, 0.0, 5.0).said.startswith("rank 1 on n1")


def test_a_rank_0_that_dies_before_its_first_beat_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    store = HashStore()
    late = heartbeat.Heartbeat(Ranks(1, 2, 1, "test"), store, seconds=0.2)
    with pytest.raises(Unhealthy, match="rank 0 on node7 fell silent after the start-up check"):
        late.__enter__()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()[:2]
    late.store.set("address", json.dumps([*address, "token"]))
    with pytest.raises(Unhealthy, match="rank 0 on node7 fell silent .*refused"):
        late.__enter__()
