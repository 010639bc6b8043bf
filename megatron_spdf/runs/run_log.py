"""Log of a run: lines for people, records in log.jsonl, the same figures in TensorBoard."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_spdf.files import open_to_append, write_file
from megatron_spdf.records import Unreadable, parse_json, to_json
from megatron_spdf.runs.measured import Record
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.text import printable_lines


class RunLog:
    """Writes the log on one rank, and does nothing on others.

    Args:
        run: directory of the run.
        step: where the run goes on; later records, written before a crash, are dropped.
        steps: length of the run, for the progress bar on a terminal.
        tensorboard: whether to write its event files.
        active: whether this rank writes.
        evaluated: step of the last evaluation; later records of evaluations are dropped; None:
            `step`.
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
        """Prints a line for people on standard output."""
        if self.active:
            self._bar.write(printable_lines(text), file=sys.stdout)
            sys.stdout.flush()

    def record(self, kind: str, step: int, **figures: Any) -> None:
        """Writes a record to log.jsonl, and its numbers, nested ones too, to TensorBoard under
        `kind/`.

        Args:
            kind: of record, such as "train" or "valid".
            figures: name -> value, or mapping of values; None: it is not finite.
        """
        if not self.active:
            return
        self._file.write(to_json({"kind": kind, "step": step, **figures}).encode() + b"\n")
        if self._board:
            for name, value in _numbers(f"{kind}/", figures):
                self._board.add_scalar(name, value, step)

    def advance(self, loss: float) -> None:
        """Moves the progress bar on by a step."""
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Closes bar and files."""
        self._bar.close()
        if self.active:
            self._file.close()
            if self._board:
                self._board.close()


def _forget_after(log: Path, step: int, evaluated: int) -> None:
    """Drops records after `step`, of evaluations after `evaluated`, and lines that are no records,
    such as a last one that a crash cut short."""
    if not log.exists():
        return
    kept = []
    for line in log.read_bytes().split(b"\n"):
        try:
            record = parse_json(line, Record, constants=True)
        except Unreadable:
            continue
        if record["step"] <= (evaluated if record["kind"] == "valid" else step):
            kept.append(line + b"\n")
    write_file(log, b"".join(kept))


def _numbers(start: str, figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _numbers(f"{start}{name}/", value)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield start + name, value
