"""What a run reports: a line for people, a record in log.jsonl, the same figures in TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_spdf.files import open_to_append, write_file
from megatron_spdf.runs.run_dir import RunDir


class RunLog:
    """Writes on rank 0, does nothing elsewhere.

    Args:
        run: whose log it is.
        step: where the run goes on; records after it, of a future that was lost, are dropped.
        steps: length of the run, for the progress bar, which appears on a terminal.
        evaluated: step of its last evaluation, as far as it will not be done again; None: of `step`
            too.
    """

    def __init__(self, run: RunDir, step: int, steps: int, tensorboard: bool, active: bool,
                 evaluated: int | None = None):
        self.active = active
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True,
                         disable=not active or not sys.stderr.isatty())
        if not active:
            return
        _forget_after(run.log, step, step if evaluated is None else evaluated)
        self._file = open_to_append(run.log, buffering=0)
        self._board = SummaryWriter(run.tensorboard, purge_step=step + 1) if tensorboard else None

    def say(self, text: str) -> None:
        """A line for people, on standard output."""
        if self.active:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, kind: str, step: int, **figures: Any) -> None:
        """A record in log.jsonl and its numbers, and those of its mappings, in TensorBoard under
        `kind/`."""
        if not self.active:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **figures}).encode() + b"\n")
        if self._board:
            for name, value in _numbers(f"{kind}/", figures):
                self._board.add_scalar(name, value, step)

    def advance(self, loss: float) -> None:
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        if self.active:
            self._file.close()
            if self._board:
                self._board.close()


def _forget_after(log: Path, step: int, evaluated: int) -> None:
    """Keeps the records up to `step`, of evaluations up to `evaluated`; a last line cut short by a
    crash goes too."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= (evaluated if record["kind"] == "valid" else step):
                kept.append(line + "\n")
        except ValueError:
            continue
    write_file(log, "".join(kept))


def _numbers(start: str, figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _numbers(f"{start}{name}/", value)
        elif isinstance(value, (int, float)):
            yield start + name, value
