"""Data sets in the making: append-only files, and the ledger that says which inputs are in them.

`DIRECTORY/ledger.jsonl` has a line for each finished input. It is written after the tokens are
safely on disk, so an interrupted run goes on from what its lines sum up to: the files are cut back
to there, and the next input is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from megatron_spdf.data.indexed.manifest import Counts, InputFile, PreprocessSettings, file_of
from megatron_spdf.data.preprocess.records import Skipped
from megatron_spdf.files import open_to_append, write_file
from megatron_spdf.records.json_reader import parse_json, read_json
from megatron_spdf.records.values import Unreadable

# Inputs smaller than this, in bytes of tokens, are made safe together: a sync takes milliseconds.
_SYNC_BYTES = 1 << 20
LENGTH = np.dtype(np.int32)  # of a document, in Megatron's index


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Work(_Record):
    """What the data sets in the making are; another tokenizer or other settings would not go with
    them.

    Attributes:
        dtype: NumPy name of the type of a token.
        versions: of the libraries that make the tokens.
    """

    settings: PreprocessSettings
    tokenizer_sha256: str
    dtype: str
    versions: dict[str, str]


class Part(Counts):
    """What an input gave to one data set."""

    bin_sha256: str


class FinishedInput(_Record):
    """An input that is in the data sets.

    Attributes:
        source: counts all data sets together.
        parts: data set -> what this input gave to it.
        part_of: data set -> (split, set name).
    """

    source: InputFile
    mtime_ns: int
    parts: dict[str, Part]
    part_of: dict[str, tuple[str | None, str | None]]
    skipped_lines: list[Skipped]


class AppendFile:
    """A file that is only ever appended to, from `size` bytes on; what is there beyond that is cut
    off."""

    def __init__(self, path: Path, size: int):
        self.path = path
        self._file = open_to_append(path)
        found = self._file.tell()
        if found < size:
            self._file.close()
            raise ValueError(f"{path} holds {found} bytes and its ledger says {size}: the disk "
                             "lost what it had taken. Remove the directory PREFIX.partial to start "
                             "anew")
        self._file.truncate(size)

    def append(self, content: bytes | np.ndarray) -> None:
        self._file.write(content)
        self._file.flush()

    def sync(self) -> None:
        """Returns when what was appended outlives a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class GrowingDataSet:
    """The tokens and document lengths of one data set.

    Args:
        base: `base`.bin and `base`.lengths are its files, made or cut back to what `counts` says
            they hold.
        dtype: of a token.
    """

    def __init__(self, base: Path, dtype: np.dtype, counts: Counts):
        base.parent.mkdir(parents=True, exist_ok=True)
        self._bin = AppendFile(file_of(base, "bin"), counts.tokens * dtype.itemsize)
        self._lengths = AppendFile(file_of(base, "lengths"), counts.documents * LENGTH.itemsize)
        self._start_input()

    def append(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Takes in whole documents: ids (tokens,), lengths (documents,), bytes of text of all of
        them."""
        self._bin.append(ids)
        self._lengths.append(lengths)
        self._digest.update(ids)
        self._counts += np.array([len(lengths), len(ids), text_bytes])

    def end_input(self) -> Part:
        """What was appended since the last end of an input."""
        documents, tokens, text_bytes = self._counts.tolist()
        part = Part(documents=documents, tokens=tokens, text_bytes=text_bytes,
                    bin_sha256=self._digest.hexdigest())
        self._start_input()
        return part

    def sync(self) -> None:
        self._bin.sync()
        self._lengths.sync()

    def close(self) -> None:
        self._bin.close()
        self._lengths.close()

    def _start_input(self) -> None:
        self._counts, self._digest = np.zeros(3, np.int64), hashlib.sha256()


class Journal:
    """The finished inputs of the work in a directory.

    Raises:
        ValueError: the directory holds other work; with each difference and the remedy.
    """

    def __init__(self, directory: Path, work: Work):
        self.directory, self.work = directory, work
        self._path = directory / "ledger.jsonl"
        self.finished: list[FinishedInput] = []
        self._pending: list[FinishedInput] = []
        self._check_work()
        self._read()

    def _check_work(self) -> None:
        path = self.directory / "work.json"
        if not path.exists():
            write_file(path, self.work.model_dump_json(indent=1))
        before = read_json(path, Work, remedy=f"remove {self.directory} to start anew").model_dump()
        now = self.work.model_dump()
        for either in (before, now):
            either["settings"].pop("on_error")  # finished inputs are the same under both
        changes = [f"{k} was {before[k]} and is {now[k]}" for k in now if k != "settings"
                   and before[k] != now[k]]
        changes += [f"{k} was {v} and is {now['settings'][k]}" for k,
                    v in before["settings"].items()
                    if v != now["settings"][k]]
        if changes:
            raise ValueError(f"{self.directory} holds an interrupted run with other settings: "
                             f"{'; '.join(changes)}. Give its settings to go on with it, or remove "
                             "that directory to start anew")

    def _read(self) -> None:
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = parse_json(line, FinishedInput)
            except Unreadable:
                break
            if not line.endswith(b"\n"):
                break
            self.finished.append(entry)
            whole += len(line)
        self._file = AppendFile(self._path, whole)

    def counts(self) -> dict[str, Counts]:
        """What the data sets hold: name -> counts, of the inputs that are safely on disk."""
        total: dict[str, Counts] = {}
        for entry in self.finished:
            for name, part in entry.parts.items():
                total[name] = add_counts(total.get(name, Counts()), part)
        return total

    def part_of(self) -> dict[str, tuple[str | None, str | None]]:
        """Data set -> (split, set name)."""
        return {name: part for entry in self.finished for name, part in entry.part_of.items()}

    def count_finished(self, paths: Sequence[Path]) -> int:
        """Number of the inputs `paths`, from the first on, that are finished.

        Raises:
            ValueError: another input was finished in the place of one, or it has changed since.
        """
        for number, entry in enumerate(self.finished):
            path = paths[number] if number < len(paths) else None
            stat = path.stat() if path else None
            if path and (str(path), stat.st_size, stat.st_mtime_ns) == (
                    entry.source.path, entry.source.size, entry.mtime_ns):
                continue
            now = f"is {path} now" if str(path) != entry.source.path else "has changed since"
            now = now if path else "is not given now"
            raise ValueError(f"{self.directory} holds an interrupted run whose input {number + 1}, "
                             f"{entry.source.path}, {now}. Give the same inputs in the same order, "
                             "and others after them, or remove that directory to start anew")
        return len(self.finished)

    def add(self, entry: FinishedInput, files: Sequence[AppendFile | GrowingDataSet],
            now: bool) -> None:
        """Notes a finished input once `files` are safe; unless `now`, several small inputs at
        once."""
        self._pending.append(entry)
        size = np.dtype(self.work.dtype).itemsize
        if not now and sum(part.tokens for e in self._pending
                           for part in e.parts.values()) * size < _SYNC_BYTES:
            return
        for file in files:
            file.sync()
        self._file.append(b"".join(e.model_dump_json().encode() + b"\n" for e in self._pending))
        self._file.sync()
        self.finished += self._pending
        self._pending = []

    def close(self) -> None:
        self._file.close()


def add_counts(one: Counts, other: Counts) -> Counts:
    return Counts(documents=one.documents + other.documents, tokens=one.tokens + other.tokens,
                  text_bytes=one.text_bytes + other.text_bytes)

