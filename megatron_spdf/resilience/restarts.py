"""Limit on starts of a run in a row that made no new checkpoint, counted in the run directory.

    python -m megatron_spdf.resilience.restarts RUN

exits with 0 if another start is allowed, or with 3 and the reason. Launch scripts ask before they
requeue a job. No engine is loaded, so that the answer comes at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from typing_extensions import TypedDict

from megatron_spdf.files import CHECKPOINT, write_json
from megatron_spdf.records.json_reader import read_json

STARTS = "starts.json"


class Starts(TypedDict):
    """Content of starts.json."""

    job: str
    step: int
    allowed: int
    starts: int


class RestartLimit(RuntimeError):
    """Too many starts in a row made no new checkpoint."""


def count_start(run: Path, allowed: int, job: str | None = None) -> None:
    """Counts a start of the run, once for each, before its ranks start.

    Args:
        run: run directory, created where it is missing.
        allowed: starts in a row without a new checkpoint.
        job: batch job; a new one counts from 1, since its user has looked at the log. None: the
            one that Slurm names.

    Raises:
        RestartLimit: that many have been made.
    """
    job = job or os.environ.get("SLURM_JOB_ID", "")
    before, step = _read(run), newest_step(run)
    goes_on = before.get("job") == job and before.get("step") == step
    if goes_on and before["starts"] >= allowed:
        raise RestartLimit(_reason(run, before))
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / STARTS, {"job": job, "step": step, "allowed": allowed,
                              "starts": before["starts"] + 1 if goes_on else 1})


def restart_refusal(run: Path) -> str:
    """Gives the reason not to start the run again, which is empty if there is none."""
    before = _read(run)
    spent = before and before["step"] == newest_step(run) and before["starts"] >= before["allowed"]
    return _reason(run, before) if spent else ""


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return max((int(found[1]) for name in names if (found := CHECKPOINT.fullmatch(name))),
               default=0)


def _read(run: Path) -> Starts | dict:
    try:
        return read_json(run / STARTS, Starts)
    except (FileNotFoundError, ValueError):  # ValueError: cut short by a crash
        return {}


def _reason(run: Path, before: dict) -> str:
    return (f"{before['starts']} starts in a row (fault_tolerance.max_starts={before['allowed']}) "
            f"made no checkpoint after step {before['step']} of {run}, so this job is not started "
            "again; the log above says what each ended with. Submit anew when it is mended: the "
            "run goes on where it was")


def main() -> int:
    """Prints the refusal for the run named on the command line and returns the exit code."""
    reason = restart_refusal(Path(sys.argv[1]))
    if reason:
        print(reason, file=sys.stderr)
    return 3 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
