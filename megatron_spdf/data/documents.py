"""Stream the documents of JSON-lines shards (plain, .zst, .gz) and text files.

A shard is never held in memory, and never silently shorter than it is: a record that cannot be read, or a
file that ends too early, is an error that names the place, or is skipped on request and then recorded.
"""

from __future__ import annotations

import functools
import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_spdf.data.zstd_stream import ZstdStream

FORMATS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt")
ON_ERROR = ("stop", "skip")
MAX_RECORDED_SKIPS = 1000
_BUFFER_BYTES = 1 << 20
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, the record's "meta" object if it has one, and the place it came from."""

    text: str
    meta: dict | None
    path: Path
    line: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record left out: the file, the line (counted from 1) and what was wrong with it."""

    path: str
    line: int
    reason: str


@dataclass
class ReadReport:
    """What became of the records of the files read so far: seen = documents + empty + skipped.

    Attributes:
        seen: records, blank lines not counted; a file's unreadable rest counts as one.
        documents: records handed out.
        empty: records whose text is "".
        skipped: records that could not be read.
        skipped_lines: the first 1,000 of those.
        bytes_read: bytes of the files as they are on disk, compressed ones compressed.
    """

    seen: int = 0
    documents: int = 0
    empty: int = 0
    skipped: int = 0
    skipped_lines: list[Skipped] = field(default_factory=list)
    bytes_read: int = 0

    def skip(self, path: Path, line: int, reason: str) -> None:
        self.skipped += 1
        if len(self.skipped_lines) < MAX_RECORDED_SKIPS:
            self.skipped_lines.append(Skipped(str(path), line, reason))


class _BadRecord(Exception):
    """What is wrong with a record, in words for the user."""


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs`, paths or glob patterns, name; a pattern's matches are in sorted order.

    Raises:
        ValueError: an input that matches nothing, a directory, a file of unknown format, a file named twice.
    """
    paths: list[Path] = []
    for pattern in map(str, inputs):
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"input {pattern!r} matches no file")
        paths += map(Path, matches)
    if not paths:
        raise ValueError("no input given; name at least one file or pattern, such as 'shards/*.jsonl.zst'")
    for path in paths:
        if path.is_dir():
            raise ValueError(f"input {path} is a directory; give its files, such as '{path}/*.jsonl.zst'")
        if not path.name.endswith(FORMATS):
            raise ValueError(f"input {path} has no known format; its name must end with one of {FORMATS}")
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise ValueError(f"input {path} is named {times} times; name each file once")
    return paths


def iterate_documents(
    paths: Sequence[str | Path],
    text_key: str = "text",
    on_error: str = "stop",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """The documents of all files, in order. Documents with an empty text are left out.

    A .jsonl file holds one JSON object a line, its text under `text_key`; a .txt file is one document.

    Args:
        paths: files or glob patterns, as in `expand_inputs`.
        on_error: "stop" raises on a record that cannot be read; "skip" leaves it out and tells `report`.
        report: counts, kept up to date while documents are drawn.

    Raises:
        ValueError: bad `paths`; under "stop", a bad record or a damaged file, with its line or byte; no
            document at all.
    """
    report = report if report is not None else ReadReport()
    for path in expand_inputs(paths):
        yield from read_shard(path, text_key, on_error, report)
    if not report.documents:
        raise ValueError(f"no document in the inputs: {report.empty} empty records, {report.skipped} skipped")


def read_shard(path: Path, text_key: str, on_error: str, report: ReadReport) -> Iterator[Document]:
    """The documents of one file; as `iterate_documents`, but a file may turn out to hold none."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}; choose one of {ON_ERROR}")
    parse = _parse_text if path.suffix == ".txt" else functools.partial(_parse_json, text_key=text_key)
    for line, record in _records(path, on_error, report):
        report.seen += 1
        try:
            text, meta = parse(record)
        except _BadRecord as error:
            _reject(path, line, str(error), on_error, report)
            continue
        if text:
            report.documents += 1
            yield Document(text, meta, path, line)
        else:
            report.empty += 1


def sample_texts(paths: Sequence[Path], text_bytes: int, text_key: str, on_error: str) -> Iterator[str]:
    """The first texts of every file, about `text_bytes` of UTF-8 in all, in even shares.

    What a short file leaves of its share goes to the files after it.
    """
    left = text_bytes
    for index, path in enumerate(paths):
        share = left // (len(paths) - index)
        for document in read_shard(path, text_key, on_error, ReadReport()):
            if share <= 0:
                break
            size = len(document.text.encode("utf-8", "surrogatepass"))
            share, left = share - size, left - size
            yield document.text


def _records(path: Path, on_error: str, report: ReadReport) -> Iterator[tuple[int, bytes]]:
    """Line number and bytes of each record."""
    read_before = report.bytes_read
    with open(path, "rb", buffering=0) as file:
        line = 1
        try:
            stream = _decompress(file, path)
            read = stream.read if path.suffix == ".txt" else stream.readline
            while record := read():
                report.bytes_read = read_before + file.tell()
                if line == 1:
                    record = record.removeprefix(b"\xef\xbb\xbf")
                if not record.isspace():
                    yield line, record
                line += 1
        except _DAMAGE as error:
            report.seen += 1
            reason = f"damaged or cut off near byte {file.tell()} of {path.stat().st_size}: {error}"
            _reject(path, line, f"{reason}; nothing after this line can be read", on_error, report)
        report.bytes_read = read_before + path.stat().st_size


def _decompress(file: BinaryIO, path: Path) -> io.BufferedIOBase:
    if path.suffix in (".zst", ".gz") and path.stat().st_size == 0:
        raise EOFError("the file is empty, which no compressed file is")
    if path.suffix == ".zst":
        return io.BufferedReader(ZstdStream(file), _BUFFER_BYTES)
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)  # another buffer around it would lose what precedes the damage
    return io.BufferedReader(file, _BUFFER_BYTES)


def _parse_text(record: bytes) -> tuple[str, None]:
    try:
        return record.decode("utf-8"), None
    except UnicodeDecodeError as error:
        line = record.count(b"\n", 0, error.start) + 1
        raise _BadRecord(f"not UTF-8: 0x{record[error.start]:02x} in line {line}") from None


def _parse_json(record: bytes, text_key: str) -> tuple[str, dict | None]:
    try:
        value = json.loads(record.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRecord(f"not UTF-8: 0x{record[error.start]:02x} at byte {error.start} of it") from None
    except (ValueError, RecursionError) as error:
        raise _BadRecord(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _BadRecord(f"not a JSON object but a {type(value).__name__}")
    if text_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:10]) or "none"
        raise _BadRecord(f"no key {text_key!r}; keys here: {keys} (--text-key names the one to take)")
    text, meta = value[text_key], value.get("meta")
    if not isinstance(text, str):
        raise _BadRecord(f"the value of {text_key!r} is not a string but a {type(text).__name__}")
    return text, meta if isinstance(meta, dict) else None


def _reject(path: Path, line: int, reason: str, on_error: str, report: ReadReport) -> None:
    if on_error == "stop":
        raise ValueError(
            f"{path}, line {line}: {reason}. Correct the file, or leave such records out with --on-error skip"
        )
    report.skip(path, line, reason)
