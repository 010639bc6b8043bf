"""A real Slurm cluster of three nodes on this machine, and a workplace for its jobs, with blanks in
all paths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "procps")
TIMING = {"tokens_per_second", "model_tflops_per_rank", "step_seconds", "data_seconds",
          "memory_bytes"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}

RECIPE = {
    "seed": 3,
    "model": {"layers": 2, "hidden": 32, "heads": 2, "vocab_size": 300, "max_positions": 32},
    "sparsity": 0.75,
    "data": {"train": "data/train", "valid": "data/valid", "workers": 0},
    "train": {"tokens": 8 * 32 * 24, "global_batch": 8, "micro_batch": 4, "precision": "fp32"},
    "optimizer": {"lr": 1e-3, "warmup_tokens": 512},
    "evaluate": {"every": 6, "batches": 2},
    # so that a fault in a save meets nothing else
    "checkpoint": {"every": 4, "asynchronous": False},
    "log": {"every": 1, "tensorboard": False},
    "fault_tolerance": {"hang_seconds": 20, "join_seconds": 300},
}


def install_slurm() -> str:
    """Empty when Slurm is there, else why it cannot be."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        return "" if os.geteuid() == 0 else "starting slurmd needs root"
    if os.geteuid() or not shutil.which("apt-get"):
        return "Slurm is not installed, and cannot be without root and apt-get"
    for command in (["apt-get", "update", "-qq"],
                    ["apt-get", "install", "-qq", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300,
                                  env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        except subprocess.TimeoutExpired:
            return f"Slurm cannot be installed: {' '.join(command)} took over five minutes"
        if done.returncode:
            return (f"Slurm cannot be installed: {' '.join(command)} said "
                    f"{done.stderr.strip().splitlines()[-1:]}")
    return ""


class Cluster:
    """Commands of the cluster, run in the workplace."""

    def __init__(self, place: Path, root: Path, env: dict[str, str]):
        self.place, self.root, self.env = place, root, env

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(command, cwd=self.place, env={**self.env, **env},
                              capture_output=True, text=True, check=False, timeout=120)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done

    def local(self, *words: str) -> None:
        """tests/slurm/local_slurm.sh."""
        self.run("bash", str(HERE / "local_slurm.sh"), *words)

    def sbatch(self, script: str, *words: str, nodes: str = "2", options: tuple[str, ...] = (),
               **env: str) -> str:
        """Submits a script of launch/ with one task on each node; returns the job's id."""
        done = self.run("sbatch", "--parsable", f"--nodes={nodes}", "--ntasks-per-node=1",
                        "--gpus-per-node=1",
                        "--cpus-per-task=1", "--mem=1G", "--output=%j.out", *options,
                        str(self.root / "launch" / script), *words, **env)
        return done.stdout.strip().splitlines()[-1]

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "show", "job", job, check=False).stdout
        return next((w.partition("=")[2] for w in shown.split() if w.startswith(f"{name}=")), "")

    def output(self, job: str) -> str:
        file = self.place / f"{job}.out"
        return file.read_text() if file.exists() else ""

    def until(self, condition: Callable[[], object], what: str, job: str = "",
              seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            said = self.output(job)[-4000:] if job else ""
            assert time.monotonic() < end, (
                f"no {what} within {seconds} s; job {job} is {self.state(job)}\n{said}"
            )
            if job and self.state(job) in ENDED:
                assert condition(), f"job {job} is {self.state(job)}, {what} did not come\n{said}"
                return
            time.sleep(0.2)

    def end_of(self, *jobs: str, seconds: float = 600) -> list[str]:
        """Waits until the jobs have ended; returns their exit codes as `state code`."""
        for job in jobs:
            self.until(lambda job=job: self.state(job) in ENDED, "end", seconds=seconds, job=job)
        return [f"{self.state(job)} {self.field(job, 'ExitCode').split(':')[0]}" for job in jobs]


def records(run: Path) -> list[dict]:
    """The log without what depends on the clock, and without the records that every start adds."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMING} for r in lines
            if r["kind"] in ("train", "valid")]
