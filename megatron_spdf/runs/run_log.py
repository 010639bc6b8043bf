"""Log of a run: lines for people, records in log.jsonl, its figures for the writers beside it."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron_spdf.files import open_to_append, write_file
from megatron_spdf.records.json_reader import parse_json
from megatron_spdf.records.json_writer import to_json
from megatron_spdf.records.values import Unreadable
from megatron_spdf.runs.measured import Record
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.writers.base import Writer
from megatron_spdf.text import printable_lines

MOST_WAITING = 10_000  # lines; older ones are lost
# Until a writer that failed is tried again: seconds, and so many times what the failure took.
AGAIN_SECONDS, AGAIN_TIMES = 60.0, 100


class RunLog:
    """Writes the log on one rank, and does nothing on others.

    A log that cannot be written, on a full disk above all, ends no run: it is said once, and tried
    again.

    Args:
        run: directory of the run.
        step: where the run goes on; later records, written before a crash, are dropped.
        steps: length of the run, for the progress bar on a terminal.
        writers: beside log.jsonl, with the values of their keys.
        active: whether this rank writes.
        evaluated: step of the last evaluation; later records of evaluations are dropped; None:
            `step`.
    """

    def __init__(self, run: RunDir, step: int, steps: int,
                 writers: Iterable[tuple[type[Writer], Any]], active: bool,
                 evaluated: int | None = None):
        self.active = active
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True,
                         disable=not active or not sys.stderr.isatty())
        if not active:
            return
        self._lines = _Lines(run.log, self.say, step, step if evaluated is None else evaluated)
        self._writers = [_Guarded(kind, value, run, self.say, step)
                         for kind, value in writers]

    def say(self, text: str) -> None:
        """Prints a line for people on standard output."""
        if self.active:
            with suppress(OSError):
                self._bar.write(printable_lines(text), file=sys.stdout)
                sys.stdout.flush()

    def record(self, kind: str, step: int, **figures: Any) -> None:
        """Writes a record to log.jsonl, and its numbers, nested ones too, to the writers as
        `kind/figure`.

        Args:
            kind: of record, such as "train" or "valid".
            figures: name -> value, or mapping of values; None: it is not finite.
        """
        if not self.active:
            return
        self._lines.write(to_json({"kind": kind, "step": step, **figures}).encode() + b"\n")
        numbers = dict(_numbers(f"{kind}/", figures)) if self._writers else {}
        for writer in self._writers:
            writer.write(step, numbers)

    def advance(self, loss: float) -> None:
        """Moves the progress bar on by a step."""
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Closes bar and files."""
        self._bar.close()
        if self.active:
            self._lines.close()
            for writer in self._writers:
                writer.close()


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


class _Guarded:
    """A writer whose failure ends no run. A new one is begun after a while, and points are missing.

    Args:
        kind, value: of the writer.
        run: directory of the run.
        say: prints a sentence.
        step: where the run goes on.
    """

    def __init__(self, kind: type[Writer], value: Any, run: RunDir, say: Callable[[str], None],
                 step: int):
        self._kind, self._value, self._run, self._say, self._step = kind, value, run, say, step
        self._writer: Writer | None = None
        self._failing, self._again = False, 0.0
        self.write(step, {})

    def write(self, step: int, figures: dict[str, float]) -> None:
        began = time.monotonic()
        if self._failing and began < self._again:
            return
        try:
            if self._writer is None:
                self._writer = self._kind(self._value, self._run, self._step)
            if figures:
                self._writer.write(step, figures)
            self._failing = False
        except Exception as error:  # whatever its threads and processes ended with
            if not self._failing:
                self._say(f"could NOT write to {self._kind.title}: {error}; the run goes on "
                          "without it for now")
            self._step = step
            self.close()
            now = time.monotonic()
            self._failing, self._again = True, now + max(AGAIN_SECONDS,
                                                         AGAIN_TIMES * (now - began))

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
