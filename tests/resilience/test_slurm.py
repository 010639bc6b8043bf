"""What Slurm says of a job is read right, in shells too that have the variables of another step."""

from __future__ import annotations

import os
import socket
import time

import pytest

from megatron_spdf.resilience import slurm
from megatron_spdf.resilience.slurm import (
    head_node,
    hosts_of_ranks,
    is_task,
    resolves,
    tasks_per_node,
    this_host,
)
from megatron_spdf.resilience.world import Ranks, find_ranks

JOB = {"SLURM_JOB_ID": "42", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
TASK = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
# as Slurm 22.05 sets them
SHELLS = {"sbatch": JOB, "salloc's interactive step": {
    **JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEPID": "4294967290", "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PTY_PORT": "38369"},
    "sbatch, where salloc's shell is the only task": {
        **JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"},
    "sbatch in a step": {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    "batch step": {**JOB, "SLURM_STEP_ID": "4294967291"}}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_no_rank(shell):
    assert not is_task(SHELLS[shell])
    assert find_ranks(SHELLS[shell]) == Ranks(0, 1, 0, "python")


def test_a_task_is_a_rank():
    assert find_ranks(TASK) == Ranks(2, 4, 0, "srun")
    own = {**TASK, "SLURM_PTY_PORT": "1", "SLURM_TASK_PID": str(os.getpid())}
    assert find_ranks(own) == Ranks(2, 4, 0, "srun")


@pytest.mark.parametrize(("env", "said"), [
    ({"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE=2: this job is heterogeneous"),
    ({"SLURM_PTY_PORT": "1", "SLURM_TASK_PID": "1"}, "one of 4 tasks of srun --pty"),
])
def test_ranks_that_would_wait_for_ever_are_refused(env, said):
    with pytest.raises(ValueError, match=said):
        find_ranks({**TASK, **env})
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert find_ranks({**TASK, **env, **launched}) == Ranks(1, 2, 1, "torchrun")


@pytest.fixture
def scontrol(monkeypatch, tmp_path):
    """Sets what scontrol prints for any node."""
    def says(hostnames: str, node: str = "") -> None:
        (tmp_path / "scontrol").write_text(
            f"#!/bin/sh\ncase $2 in hostnames) printf '{hostnames}';; *) printf '{node}';; esac\n")
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return says


def test_a_head_node_whose_name_is_not_the_hosts(scontrol):
    nodes = {"SLURM_STEP_NODELIST": "a[1-2]"}
    scontrol("a1.invalid\\na2.invalid\\n", "NodeAddr=127.0.0.1 NodeHostName=nobody.invalid")
    assert head_node(nodes) == "127.0.0.1"
    scontrol("a1.invalid\\n", "NodeAddr=a1.invalid NodeHostName=localhost Version=1")
    assert head_node(nodes) == "localhost"
    scontrol("localhost\\n", "NodeAddr=127.0.0.9")
    assert head_node(nodes) == "localhost"
    scontrol("a1.invalid\\n")
    assert head_node(nodes) == "a1.invalid" and not resolves("a1.invalid")


def test_a_host_is_named_with_its_node():
    host = socket.gethostname()
    assert this_host({}) == this_host({"SLURMD_NODENAME": host.partition(".")[0]}) == host
    assert this_host({"SLURMD_NODENAME": "n7"}) == f"{host} (node n7)"


def test_tasks_per_node():
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    assert tasks_per_node("1") == [1]


def test_a_controller_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)
    env = {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    began = time.monotonic()
    assert hosts_of_ranks(env) == {}
    with pytest.raises(ValueError, match=r"the node list 'a\[1-2\]' \(no answer in 0.2 s\); exp"):
        head_node(env)
    assert time.monotonic() - began < 20


def test_hosts_of_ranks(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'a1\\na2\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    env = {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    assert hosts_of_ranks(env) == {0: "a1", 1: "a1", 2: "a2"}
    assert hosts_of_ranks({}) == {}
