"""What Slurm says of a job: whether this process is a task of it, its nodes, their addresses."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping

# steps of salloc's shell and of sbatch's script, in slurm.h SLURM_INTERACTIVE_STEP and
# SLURM_BATCH_SCRIPT
SHELLS = ("4294967290", "4294967291")
ANSWER_SECONDS = 60.0  # that scontrol has


def is_task(env: Mapping[str, str] = os.environ) -> bool:
    """True if srun started this process.

    The variables of a step also reach shells: that of salloc, which has the tasks of the job, and
    those of jobs that are submitted in a step. There the tasks of the step and of the job differ.

    Raises:
        ValueError: ranks would wait for each other for ever.
    """
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    tasks = env.get("SLURM_NTASKS")
    if step is None or step in SHELLS:
        return False
    if tasks is not None and env.get("SLURM_STEP_NUM_TASKS", tasks) != tasks:
        return False
    if env.get("SLURM_HET_SIZE", "1") != "1":
        raise ValueError(f"SLURM_HET_SIZE={env['SLURM_HET_SIZE']}: this job is heterogeneous, and "
                         "srun numbers the ranks of one component only; submit a job without ':', "
                         "whose nodes are alike")
    own = env.get("SLURM_TASK_PID", str(os.getpid())) == str(os.getpid())
    if "SLURM_PTY_PORT" in env and tasks != "1" and not own:
        raise ValueError(f"this shell is one of {tasks} tasks of srun --pty, and the other tasks "
                         "start no ranks; start them with srun python ... in the shell that salloc "
                         "opens, or with torchrun")
    return True


def head_node(env: Mapping[str, str] = os.environ) -> str:
    """The step's first node: its name, or where this host cannot resolve that, an address that
    Slurm has.

    Raises:
        ValueError: Slurm does not say.
    """
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes or not shutil.which("scontrol"):
        raise ValueError("MASTER_ADDR is not set and there is no Slurm node list to find the head "
                         "node in; export MASTER_ADDR=<host of rank 0>")
    shown = _scontrol("show", "hostnames", nodes)
    if shown.returncode or not shown.stdout.split():
        raise ValueError(f"scontrol cannot expand the node list {nodes!r} "
                         f"({shown.stderr.strip()}); export MASTER_ADDR=<host of rank 0>")
    name = shown.stdout.split()[0]
    known = re.findall(r"\b(?:NodeAddr|NodeHostName)=(\S+)", _scontrol("show", "node", name).stdout)
    return next(filter(resolves, [name, *known]), name)


def resolves(name: str) -> bool:
    """True if this host knows an address of a name."""
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def this_host(env: Mapping[str, str] = os.environ) -> str:
    """Name of this host for people, with that of the node in Slurm where it is another."""
    host, node = socket.gethostname(), env.get("SLURMD_NODENAME")
    same = not node or host.partition(".")[0] == node.partition(".")[0]
    return host if same else f"{host} (node {node})"


def hosts_of_ranks(env: Mapping[str, str] = os.environ) -> dict[int, str]:
    """Maps ranks of an srun step in block distribution to hosts. Empty without Slurm."""
    nodes, tasks = env.get("SLURM_STEP_NODELIST"), env.get("SLURM_STEP_TASKS_PER_NODE")
    if not nodes or not tasks or not shutil.which("scontrol"):
        return {}
    shown = _scontrol("show", "hostnames", nodes)
    counted = zip(shown.stdout.split(), tasks_per_node(tasks), strict=False)
    return dict(enumerate(host for host, count in counted for _ in range(count)))


def tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's short form, `8(x2),4` -> [8, 8, 4]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(n) for n, times in found for _ in range(int(times or 1))]


def _scontrol(*words: str) -> subprocess.CompletedProcess:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False,
                              timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:  # its controller is down, or busy
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {ANSWER_SECONDS:g} s")
