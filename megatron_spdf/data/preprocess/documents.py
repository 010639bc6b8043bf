"""The documents of JSON-lines shards (plain, .zst, .gz), Parquet files and text files.

A record that cannot be read is an error that names the place, or is skipped on request and then
recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spdf.data.preprocess import parquet
from megatron_spdf.data.preprocess.records import (
    MAX_RECORD_BYTES,
    MAX_RECORDED_SKIPS,
    ON_ERROR,
    ReadReport,
    Skipped,
    read_records,
    reject,
)
from megatron_spdf.data.signatures import format_of_content
from megatron_spdf.files import require_fetched
from megatron_spdf.paths import named_by, same_file
from megatron_spdf.records.foreign import describe, foreign_record
from megatron_spdf.records.values import Unreadable

__all__ = ["MAX_RECORDED_SKIPS", "ON_ERROR", "ReadReport", "Skipped"]

_PACKED = (".zst", ".gz", parquet.SUFFIX)
# JSON lines go by several names
FORMATS = (*(f".{kind}{packed}" for kind in ("jsonl", "ndjson", "json")
             for packed in ("", ".zst", ".gz")), parquet.SUFFIX, ".txt")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, the record's "meta" object if it has one, the place it came from, and
    the record itself if it is one."""

    text: str
    meta: dict | None
    path: Path
    line: int
    record: dict | None = None

    def value(self, key: str) -> Any:
        """What the record says under `key`, in its "meta" or, where that says nothing, itself."""
        return next((said[key] for said in (self.meta, self.record) if said and key in said), None)


class BadRecord(Exception):
    """What is wrong with a record, in words for the user."""


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs`, paths or glob patterns, name; a pattern's matches are in sorted
    order.

    Raises:
        ValueError: an input that matches nothing, a directory, a file of unknown format or one
            whose library is missing, a file named twice.
    """
    paths: list[Path] = []
    for pattern in map(str, inputs):
        matches = named_by(pattern)
        if not matches:
            raise ValueError(f"input {pattern!r} matches no file; correct the path or the "
                             "pattern")
        paths += map(Path, matches)
    if not paths:
        raise ValueError("no input given; name at least one file or pattern, such as "
                         "'shards/*.jsonl.zst'")
    for path in paths:
        if path.is_dir():
            raise ValueError(f"input {path} is a directory; give its files, such as "
                             f"'{path}/*.jsonl.zst'")
        if not path.name.endswith(FORMATS):
            raise ValueError(f"input {path} has no known format; its name must end with one of "
                             f"{FORMATS}")
        _require_format(path)
        if path.suffix == parquet.SUFFIX:
            parquet.require_pyarrow(path)
    if twice := same_file(paths):
        first, second = twice
        also = "twice" if first == second else f"a second time as {second}, through a link"
        raise ValueError(f"input {first} is named {also}; name each file once")
    return paths


def _require_format(path: Path) -> None:
    """Raises a ValueError where a file begins as those of another format do than its name says, or
    has not been fetched."""
    if not path.is_file():
        return  # a pipe has no beginning to look at
    require_fetched(path)
    found = format_of_content(path)
    if found and found != path.suffix:
        remedy = "give it such a name" if found in _PACKED else "unpack it"
        raise ValueError(f"input {path} begins as files whose names end in {found} do; {remedy}, "
                         "or look at what it is")


def iterate_documents(
    paths: Sequence[str | Path],
    text_key: str = "text",
    on_error: str = "stop",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """The documents of all files, in order. Documents with an empty text are left out.

    A file of JSON lines holds one JSON object a line, its text under `text_key`, and a Parquet file
    has a row for each, its text in the column of that name; a .txt file is one document.

    Args:
        paths: files or glob patterns, as in `expand_inputs`.
        on_error: "stop" raises on a record that cannot be read; "skip" leaves it out and tells
            `report`.
        report: counts, kept up to date while documents are drawn.

    Raises:
        ValueError: bad `paths`; under "stop", a bad record or a damaged file, with its line or
            byte; no document at all.
    """
    report = report if report is not None else ReadReport()
    for path in expand_inputs(paths):
        yield from read_shard(path, text_key, on_error, report)
    if not report.documents:
        raise ValueError(f"no document in the inputs: {report.empty} empty records, "
                         f"{report.skipped} skipped")


def read_shard(
    path: Path, text_key: str, on_error: str, report: ReadReport, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Document]:
    """The documents of one file; as `iterate_documents`, but a file may turn out to hold none."""
    records = read_input(path, (text_key,), on_error, report, max_bytes)
    yield from parse_records(path, records, text_key, on_error, report)


def read_input(path: Path, keys: Sequence[str], on_error: str, report: ReadReport,
               max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The records of a file with their numbers, of whatever format; see `records.read_records`.

    Args:
        keys: of a record that are of interest, beside "meta"; the first is that of the text.
    """
    if path.suffix == parquet.SUFFIX:
        return parquet.read_rows(path, (*keys, "meta"), on_error, report, max_bytes)
    return read_records(path, on_error, report, max_bytes)


def parse_records(
    path: Path, records: Iterator[tuple[int, bytes]], text_key: str, on_error: str,
    report: ReadReport
) -> Iterator[Document]:
    """The documents of records of `path`, given with their line numbers; `report.seen` is left to
    the reader."""
    parse = _parse_text if path.suffix == ".txt" else _parse_json
    for line, record in records:
        try:
            text, whole = parse(record, text_key)
        except BadRecord as error:
            reject(path, line, str(error), on_error, report)
            continue
        if text:
            report.documents += 1
            meta = whole and whole.get("meta")
            yield Document(text, meta if isinstance(meta, dict) else None, path, line, whole)
        else:
            report.empty += 1


def sample_texts(paths: Sequence[Path], text_bytes: int, text_key: str,
                 on_error: str) -> Iterator[str]:
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


def _parse_text(record: bytes, _: str) -> tuple[str, None]:
    try:
        return record.decode("utf-8"), None
    except UnicodeDecodeError as error:
        line = record.count(b"\n", 0, error.start) + 1
        raise BadRecord(f"not UTF-8: 0x{record[error.start]:02x} in line {line}") from None


def _parse_json(record: bytes, text_key: str) -> tuple[str, dict]:
    try:
        value = foreign_record(record)
    except Unreadable as error:
        hint = "; a record is one line" if record.strip() in (b"{", b"[") else ""
        raise BadRecord(f"{error}{hint}") from None
    if not isinstance(value, dict):
        raise BadRecord(f"not a JSON object but a {type(value).__name__}")
    if text_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:10]) or "none"
        raise BadRecord(
            f"no key {text_key!r}; keys here: {keys} (--text-key names the one to take)"
        )
    text = value[text_key]
    if not isinstance(text, str):
        raise BadRecord(f"the value of {text_key!r} is not a string but {describe(text)}")
    return text, value
