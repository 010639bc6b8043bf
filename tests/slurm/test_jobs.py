"""sbatch launch/*.sh on a real cluster: to the end, through every kind of interruption, and not for
ever.

FAULTS=all goes through every fault in every stage; without it each fault is met in one stage and
each stage with two faults.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable

import pytest
from local_cluster import Cluster, records

pytestmark = pytest.mark.slow

# A step right after a save is none of them: who outlives a peer in a save gets as far as there
# before it ends. And two lie between those of a sequence: who is asked to stop goes on for as many.
# evaluates each 6th, saves each 4th
STEP = {"train": (3, 10, 21), "evaluate": (6, 12, 18), "save": (8, 16, 24)}


@pytest.fixture(scope="module")
def limited(cluster):
    """A run that waits in step 9 until Slurm tells it that its time is nearly up. Others run
    meanwhile."""
    return cluster.sbatch("pretrain_gpt2small.sh", "recipe.yaml", "output=limited",
                          "fault_tolerance.hang_seconds=3600", SPDF_FAULTS="limited:train:9:0:WAIT",
                          options=("--time=60", "--signal=B:USR1@60"))


def let_time_run_out(cluster: Cluster, limited: str) -> None:
    """Once it waits in step 9, however long a start takes here: two minutes are left to it, and a
    next start has two more than this one has had."""
    cluster.until((cluster.place / "limited-train-9-WAIT.done").exists, "step 9", limited)
    hours, minutes, _ = map(int, cluster.field(limited, "RunTime").split(":"))
    cluster.run("scontrol", "update", f"JobId={limited}", f"TimeLimit={60 * hours + minutes + 2}")


@pytest.fixture(scope="module")
def loop(cluster):
    """A run that dies in step 3 whenever it is started."""
    return cluster.sbatch("pretrain_gpt2small.sh", "recipe.yaml", "output=loop",
                          "fault_tolerance.max_starts=2", nodes="1",
                          SPDF_FAULTS="loop:train:every3:0:KILL")


@pytest.fixture(scope="module")
def straight(cluster, limited, loop):
    """An undisturbed run on two nodes, of which one is slow."""
    job = cluster.sbatch("pretrain_gpt3xl.sh", "recipe.yaml", "output=straight",
                         "log.ranks_every=8",
                         "log.tensorboard=true", SPDF_FAULTS="straight:train:all:1:SLOW")
    assert cluster.end_of(job) == ["COMPLETED 0"], cluster.output(job)
    let_time_run_out(cluster, limited)
    return cluster.output(job), records(cluster.place / "straight")


def test_the_happy_path(straight):
    out, log = straight
    assert [r["step"] for r in log if r["kind"] == "train"] == list(range(1, 25))
    for said in ("2 ranks", "data 2", "node1: rank 0, cpu", "node2: rank 1, cpu", "clock"):
        assert said in out


def test_the_slow_rank_is_named_in_log_and_tensorboard(cluster, straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = re.findall(r"step (\d+): rank (\d) on (\w+) is slow", straight[0])
    assert said == [(step, "1", "node2") for step in ("8", "16", "24")], straight[0]
    lines = [json.loads(line)
             for line in (cluster.place / "straight/log.jsonl").read_text().splitlines()]
    assert [list(r["own_seconds"]) for r in lines if r["kind"] == "ranks"] == [["1"]] * 3
    events = EventAccumulator(str(cluster.place / "straight/tensorboard"))
    events.Reload()
    assert [e.value >= 0.2 for e in events.Scalars("ranks/own_seconds/1")] == [True] * 3


def kill_node(cluster: Cluster, job: str) -> None:
    """The node of rank 1 loses its power; the job is started again without it."""
    before = int(cluster.field(job, "Restarts"))
    node = cluster.run("scontrol", "show", "hostnames",
                       cluster.field(job, "NodeList")).stdout.split()[1]
    cluster.local("kill-node", node)
    cluster.until(lambda: int(cluster.field(job, "Restarts")) > before,
                  f"restart after {node} died", job)
    cluster.local("start-node", node)


def from_outside(*command: str) -> Callable[[Cluster, str], None]:
    """A command with the job's id at its end."""
    return lambda cluster, job: cluster.run(*command, job)


DEEDS: dict[str, Callable[[Cluster, str], object] | str] = {
    "rank killed": "KILL",
    "rank stopped": "STOP",
    "requeue": from_outside("scontrol", "requeue"),
    "TERM": from_outside("scancel", "--signal=TERM"),
    "USR1": from_outside("scancel", "--signal=USR1", "--batch"),
    "node killed": kill_node,
}
SOME = [("rank killed", "train", 3, 1), ("rank stopped", "evaluate", 6, 1),
        ("requeue", "save", 8, 0), ("TERM", "train", 11, 1), ("USR1", "evaluate", 12, 0),
        ("node killed", "save", 16, 1)]


def sequences() -> list[list[tuple[str, str, int, int]]]:
    if os.environ.get("FAULTS") != "all":
        return [SOME]
    names, stages = list(DEEDS), list(STEP)
    order = sorted((step, stage) for stage, steps in STEP.items() for step in steps)
    met: dict[str, int] = dict.fromkeys(stages, 0)
    found: list[list[tuple[str, str, int, int]]] = [[], []]
    for turn in range(2):
        for i, (step, stage) in enumerate(order):
            found[turn].append((names[met[stage] % len(names)], stage, step, i % 2))
            met[stage] += 1
    return found


@pytest.mark.parametrize("sequence", sequences(), ids=lambda s: f"{len(s)} faults")
def test_interrupted_in_every_way_equals_straight(cluster, straight, sequence, request):
    output = f"disturbed{request.node.callspec.indices['sequence']}"
    deeds = {name: deed if isinstance(deed, str) else "PAUSE" for name, deed in DEEDS.items()}
    faults = " ".join(f"{output}:{stage}:{step}:{rank}:{deeds[name]}" for name, stage, step,
                      rank in sequence)
    # Faults may follow each other without a save between them, which is no crash loop.
    job = cluster.sbatch("pretrain_gpt3xl.sh", "recipe.yaml", f"output={output}",
                         f"fault_tolerance.max_starts={len(sequence)}", SPDF_FAULTS=faults)
    flag = cluster.place / f"{output}-paused"
    for name, stage, step, _ in sequence:
        if isinstance(DEEDS[name], str):
            continue
        where = f"{stage} {step}"
        cluster.until(lambda where=where: flag.exists() and flag.read_text() == where, where, job,
                      seconds=600)
        DEEDS[name](cluster, job)
        flag.unlink()
    assert cluster.end_of(job) == ["COMPLETED 0"], cluster.output(job)
    out = cluster.output(job)
    assert records(cluster.place / output) == straight[1], out
    assert int(cluster.field(job, "Restarts")) >= len(sequence)
    check_what_was_said(sequence, out)


def check_what_was_said(sequence: list[tuple[str, str, int, int]], out: str) -> None:
    for name, _, _, rank in sequence:
        if name == "rank killed":
            assert re.search(rf"the run ends .*: rank {rank} on node\d died .* last collective: ",
                             out), out
        if name == "rank stopped":
            assert re.search(rf"the run ends .*: rank {rank} on node\d has been silent .* last "
                             r"collective: ", out), out
        if name in ("TERM", "USR1"):
            assert "the run was asked to stop and has saved; back into the queue" in out


def test_ahead_of_its_time_limit_a_job_saves_and_goes_on(cluster, straight, limited):
    assert cluster.end_of(limited) == ["COMPLETED 0"], cluster.output(limited)
    out = cluster.output(limited)
    saved = "the run was asked to stop and has saved; back into the queue"
    assert (
        out.index("== got USR1")
        < out.index(saved)
        < re.search("resumed from step_000000(09|10)", out).start()
    )
    assert records(cluster.place / "limited") == straight[1]


def test_a_crash_loop_stops_after_the_bound_with_the_reason(cluster, loop):
    assert cluster.end_of(loop) == ["FAILED 3"], cluster.output(loop)
    assert cluster.field(loop, "Restarts") == "1"
    reason = (
        "2 starts in a row (fault_tolerance.max_starts=2) made no checkpoint after step 0 of loop"
    )
    assert reason in cluster.output(loop)


def test_another_number_of_nodes_at_every_start(cluster, straight):
    out = ""
    for step, nodes in ((7, "2"), (15, "1"), (None, "2")):
        job = cluster.sbatch("pretrain_gpt2small.sh", "recipe.yaml", "output=moved", nodes=nodes,
                             SPDF_FAULTS="moved:train:7:0:WAIT moved:train:15:0:WAIT")
        if step:
            waits = cluster.place / f"moved-train-{step}-WAIT.done"
            cluster.until(waits.exists, f"step {step}", job)
            cluster.run("scancel", "--signal=USR1", "--batch", job)
            cluster.until(lambda job=job: cluster.state(job) == "PENDING", "requeue", job)
            cluster.run("scancel", job)
        else:
            assert cluster.end_of(job) == ["COMPLETED 0"], cluster.output(job)
        out += cluster.output(job)
    assert re.findall(r"layout: (\d) ranks?", out) == ["2", "1", "2"], out
    assert out.count("resumed from step_") == 2
    assert close(records(cluster.place / "moved"), straight[1])


def close(found: list[dict], wanted: list[dict]) -> bool:
    """The same records, floats within what summation in another order changes in fp32."""
    def alike(a: object, b: object) -> bool:
        if isinstance(a, float) or isinstance(b, float):
            return a == pytest.approx(b, rel=1e-4, abs=1e-7)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
        return a == b
    return len(found) == len(wanted) and all(alike(a, b) for a,
                                             b in zip(found, wanted, strict=True))


def test_a_job_that_is_cancelled_is_not_started_again(cluster):
    job = cluster.sbatch("pretrain_gpt2small.sh", "recipe.yaml", "output=canceled", nodes="1",
                         SPDF_FAULTS="canceled:train:2:0:PAUSE")
    cluster.until(lambda: (cluster.place / "canceled-paused").exists(), "step 2", job)
    cluster.run("scancel", job)
    (cluster.place / "canceled-paused").unlink()
    cluster.until(lambda: cluster.state(job) == "CANCELLED", "end", job)
    assert cluster.field(job, "Restarts") == "0"
