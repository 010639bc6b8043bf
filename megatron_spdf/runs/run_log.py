"""Log of a run: lines for people, records in log.jsonl, the same figures in TensorBoard."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_spdf.files import open_to_append, write_file
from megatron_spdf.records import Unreadable, parse_json, to_json
from megatron_spdf.runs.measured import Record
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.text import printable_lines

MOST_WAITING = 10_000  # lines; older ones are lost
AGAIN_SECONDS = 60.0  # until TensorBoard's files are tried again


class RunLog:
    """Writes the log on one rank, and does nothing on others.

    A log that cannot be written, on a full disk above all, ends no run: it is said once, and tried
    again.

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
        self._lines = _Lines(run.log, self.say, step, step if evaluated is None else evaluated)
        self._board = _Board(run.tensorboard, self.say, step) if tensorboard else None

    def say(self, text: str) -> None:
        """Prints a line for people on standard output."""
        if self.active:
            with suppress(OSError):
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
        self._lines.write(to_json({"kind": kind, "step": step, **figures}).encode() + b"\n")
        if self._board:
            self._board.write(step, dict(_numbers(f"{kind}/", figures)))

    def advance(self, loss: float) -> None:
        """Moves the progress bar on by a step."""
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Closes bar and files."""
        self._bar.close()
        if self.active:
            self._lines.close()
            if self._board:
                self._board.close()


class _Lines:
    """Lines of log.jsonl. Those that could not be written wait for the next one.

    Args:
        path: of the file.
        say: prints a sentence.
        step, evaluated: see `_forget_after`.
    """

    def __init__(self, path: Path, say: Callable[[str], None], step: int, evaluated: int):
        self._path, self._say = path, say
        self._forget: tuple[int, int] | None = (step, evaluated)
        self._file: IO[bytes] | None = None
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._failing = False
        self.write()

    def write(self, *lines: bytes) -> None:
        self._waiting.extend(lines)
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            if not self._failing:
                self._say(f"could NOT write {self._path}: {error}; the run goes on, and its "
                          "records wait")
            self._failing = True
            return
        self._waiting.clear()
        if self._failing:
            self._say(f"{self._path} can be written again")
        self._failing = False

    def _append(self, content: bytes) -> None:
        if self._forget:
            _forget_after(self._path, *self._forget)
            self._forget = None
        if self._file is None:
            self._file = open_to_append(self._path, buffering=0)
        end = self._file.tell()
        try:
            if self._file.write(content) < len(content):  # what still fitted on a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            self.close()  # its file system may have been mounted anew
            raise

    def close(self) -> None:
        file, self._file = self._file, None
        if file:
            with suppress(OSError):
                file.close()


class _Board:
    """Event files of TensorBoard. After a failure a new one is begun, and points are missing.

    Args:
        directory: of the files.
        say: prints a sentence.
        step: where the run goes on.
    """

    def __init__(self, directory: Path, say: Callable[[str], None], step: int):
        self._directory, self._say, self._purge = directory, say, step + 1
        self._writer: SummaryWriter | None = None
        self._failing, self._again = False, 0.0
        self.write(step, {})

    def write(self, step: int, figures: dict[str, float]) -> None:
        if self._failing and time.monotonic() < self._again:
            return
        try:
            if self._writer is None:
                self._writer = SummaryWriter(self._directory, purge_step=self._purge)
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._failing = False
        except Exception as error:  # whatever its thread ended with
            if not self._failing:
                self._say(f"could NOT write {self._directory}: {error}; the run goes on without "
                          "TensorBoard for now")
            self._failing, self._again = True, time.monotonic() + AGAIN_SECONDS
            self._purge = step + 1
            self.close()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer:
            with suppress(Exception):
                writer.close()


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
