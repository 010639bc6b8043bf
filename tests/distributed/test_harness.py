"""The ranks of tests: what they run once, what they run again, and what is said when one fails."""

import os
import signal
import subprocess
import sys
import time

import harness
import psutil
import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.slow


def moment(recipe: dict, **options) -> dict:
    return {"rank": os.environ["RANK"], "pid": os.getpid(), "at": time.time(), **recipe}


def moment_too(recipe: dict) -> dict:
    return moment(recipe)


def fail_on(rank: int) -> str:
    if os.environ["RANK"] == str(rank):
        raise ValueError(f"rank {rank} cannot")
    return "done"


def fail_before_joining(rank: int) -> None:
    fail_on(rank)
    harness.agree_on_port()
    dist.init_process_group("gloo")


def fail_as_another_dies() -> None:
    fail_on(0)
    time.sleep(0.2)
    os._exit(3)


def end_the_tests(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    time.sleep(600)


def die() -> None:
    print("its last words", flush=True)
    os._exit(3)


def test_a_call_runs_once_and_any_other_runs_on_the_same_ranks(ranks):
    first, *calls = ({"output": None, "seed": 1}, {"output": None, "seed": 2},
                     {"output": "here", "seed": 1})
    found = ranks(2).run_all(moment, first)
    assert [there["rank"] for there in found] == ["0", "1"]
    assert ranks(2).run_all(moment, {"seed": 1, "output": None}) == found
    others = [ranks(2).run(moment, call) for call in calls]
    others += [ranks(2).run(moment_too, first), ranks(2).run(moment, first, ids=torch.ones(2)),
               ranks(2).run(moment, first, ids=torch.zeros(2)),
               ranks(2).run(moment, first, of=moment), ranks(2).run(moment, first, of=moment_too)]
    assert len({there["at"] for there in (found[0], *others)}) == 1 + len(others)
    assert {there["pid"] for there in others} == {found[0]["pid"]}
    outputs = [there["output"] for there in (found[0], *others)]
    assert outputs[2] == "here" and len(set(outputs)) == len(outputs)


def test_a_rank_that_raises_is_named_by_its_trace_and_the_next_call_runs(ranks):
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"in fail_on\n(.*\n)*ValueError: rank 1 cannot"):
            ranks(2).run(fail_on, 1)
    assert ranks(2).run(fail_on, rank=5) == "done"


@pytest.mark.parametrize("rank", [0, 1])
def test_others_that_wait_for_a_rank_that_raised_are_ended(ranks, monkeypatch, rank):
    monkeypatch.setattr(harness, "TIMEOUT", 100)
    monkeypatch.setattr(harness, "GRACE", 0.5)
    began = time.monotonic()
    with pytest.raises(AssertionError, match=f"ValueError: rank {rank} cannot$"):
        ranks(2).run(fail_before_joining, rank)
    assert time.monotonic() < began + 50
    assert ranks(2).run(fail_on, rank=6) == "done"


def test_a_rank_that_dies_of_what_another_raised_hides_no_trace(ranks):
    with pytest.raises(AssertionError, match="rank 1 died") as said:
        ranks(2).run(fail_as_another_dies)
    assert "ValueError: rank 0 cannot" in str(said.value)


def test_a_rank_that_dies_between_calls_is_said_and_another_takes_its_place(ranks):
    pid = ranks(2).run(moment, {"of": "the first"})["pid"]
    psutil.Process(pid).kill()
    with pytest.raises(AssertionError, match="rank 0 (had )?died"):
        ranks(2).run(moment, {"of": "the second"})
    assert ranks(2).run(moment, {"of": "the third"})["pid"] != pid


def test_an_answer_that_nobody_waited_for_is_not_the_next_calls(ranks):
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a time limit"))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(pytest.fail.Exception, match="a time limit"):
            ranks(2).run(time.sleep, 2.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ranks(2).run(fail_on, rank=7) == "done"


def test_a_rank_that_dies_or_takes_too_long_is_said_and_others_take_its_place(ranks, monkeypatch):
    before = ranks(2).run(moment, {"of": "before"})["pid"]
    with pytest.raises(AssertionError, match=r"rank \d died; exit codes .*\n(.*\n)*its last words"):
        ranks(2).run(die)
    assert ranks(2).run(moment, {"of": "after"})["pid"] != before
    monkeypatch.setattr(harness, "TIMEOUT", 0.5)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] were not done after 0.5 s"):
        ranks(2).run(time.sleep, 60)


def test_ranks_and_commands_end_with_the_tests_however_these_end(tmp_path):
    """As in a test that is killed, or a time limit of pytest's that ends its process."""
    program = f"""
import os, sys, time
sys.path[:0] = {[str(harness.ROOT / "tests"), str(harness.ROOT / "tests/distributed")]}
from pathlib import Path
import harness, test_harness
from warm_commands import Warm
Path("script.py").write_text("import time; time.sleep(600)")
ranks = harness.Ranks(2, Path.cwd())
command = Warm(["script.py"], ".", dict(os.environ))
print(ranks.run(test_harness.moment, {{}})["pid"], command.pid)
ranks.run(test_harness.end_the_tests, os.getpid())
"""
    done = subprocess.run([sys.executable, "-u", "-c", program], cwd=tmp_path, text=True,
                          timeout=200, stdout=subprocess.PIPE, check=False)
    pids = list(map(int, done.stdout.split()))
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert len(pids) == 2 and not psutil.wait_procs(left, timeout=60)[1]
