"""The ranks of tests: what they run once, what they run again, and what is said when one fails."""

import os
import time

import harness
import pytest
import torch

pytestmark = pytest.mark.slow


def moment(recipe: dict, **options) -> dict:
    return {"rank": os.environ["RANK"], "pid": os.getpid(), "at": time.time(), **recipe}


def moment_too(recipe: dict) -> dict:
    return moment(recipe)


def fail_on(rank: int) -> str:
    if os.environ["RANK"] == str(rank):
        raise ValueError(f"rank {rank} cannot")
    return "done"


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


def test_a_rank_that_dies_or_takes_too_long_is_said_and_others_take_its_place(ranks, monkeypatch):
    before = ranks(2).run(moment, {"of": "before"})["pid"]
    with pytest.raises(AssertionError, match=r"rank \d died; exit codes .*\n(.*\n)*its last words"):
        ranks(2).run(die)
    assert ranks(2).run(moment, {"of": "after"})["pid"] != before
    monkeypatch.setattr(harness, "TIMEOUT", 0.5)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] were not done after 0.5 s"):
        ranks(2).run(time.sleep, 60)
