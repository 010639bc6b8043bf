"""Reading the files of tasks; what is malformed is named with its file and line."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_spdf.data.signatures import format_of_content
from megatron_spdf.records.foreign import foreign_record
from megatron_spdf.records.values import Unreadable, read_bytes
from megatron_spdf.text import printable

MOST_BYTES = 1 << 30  # of a data set in one JSON value


def find_file(path: Path, patterns: tuple[str, ...], task: str, split: str) -> Path:
    """`path` where it is a file; the match of the patterns, the better ones first, where it is a
    directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: several match one pattern, or the file is compressed.
    """
    if path.is_file():
        _require_unpacked(path)
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give the {split} file of {task}, or its "
                                "directory")
    for pattern in patterns:
        if matches := sorted(path.glob(pattern)):
            if len(matches) > 1:
                raise ValueError(f"{path} has {_some(matches)}, and each may be the {split} split "
                                 f"of {task}; leave the one there that is meant")
            _require_unpacked(matches[0])
            return matches[0]
    raise FileNotFoundError(f"{path} has no {' or '.join(patterns)}, the {split} split of {task}; "
                            f"there are {_some(sorted(path.iterdir())) or 'no files'}, and a file "
                            "that is compressed is unpacked first")


def _require_unpacked(path: Path) -> None:
    """Raises a ValueError where a file is packed, by whatever name."""
    if path.is_file() and (found := format_of_content(path)):
        raise ValueError(f"{path} begins as files whose names end in {found} do, and files of "
                         "tasks are read as they are; unpack it")


def _some(paths: list[Path]) -> str:
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return ", ".join(printable(path.name) for path in paths[:8]) + more


def csv_rows(path: Path, required: tuple[str, ...],
             optional: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """The records of a CSV file with a header: where each ends, "FILE, line N", and its fields by
    lower-case name.

    Raises:
        ValueError: a column is missing or given twice, a record has another number of fields, or
            the file is no UTF-8 CSV.
    """
    csv.field_size_limit(sys.maxsize)  # articles are longer than the library's 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [name.strip().lower() for name in next(rows, [])]
            missing = [name for name in required if name not in header]
            if missing:
                raise ValueError(f"{path}, line 1: no column {', '.join(missing)}; the header is "
                                 f"{header}")
            for name in (*required, *optional):
                if header.count(name) > 1:
                    raise ValueError(f"{path}, line 1: the column {name} is given twice; rename "
                                     "the one that is not meant")
            columns = {name: header.index(name) for name in (*required, *optional)
                       if name in header}
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if row and len(row) != len(header):
                    raise ValueError(f"{where}: {len(row)} fields where the header has "
                                     f"{len(header)}")
                if row:
                    yield where, {name: row[column] for name, column in columns.items()}
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: not CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place; blank lines are passed over.

    Raises:
        ValueError: a line is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _object(where, line)


def json_file(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return foreign_record(read_bytes(path, MOST_BYTES))
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from None


def _object(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = foreign_record(line)
    except Unreadable as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__} instead of an object; write one "
                         "object a line, not all of them in a list")
    return record


def text_of(where: str, record: dict[str, Any], field: str) -> str:
    """The text in a field.

    Raises:
        ValueError: the field is missing, no text, or blank.
    """
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}")
    return checked_text(where, field, record[field])


def list_of(where: str, record: dict[str, Any], field: str) -> list[Any]:
    """The list in a field.

    Raises:
        ValueError: the field is missing or no list.
    """
    if not isinstance(record.get(field), list):
        raise ValueError(f"{where}: field {field!r} must be a list; it is "
                         f"{record.get(field)!r:.80}")
    return record[field]


def texts_of(where: str, record: dict[str, Any], field: str) -> tuple[str, ...]:
    """The texts in a field that is a list of them, blank ones left out: published sets have a few.

    Raises:
        ValueError: the field is missing, no list, or holds what is no text, or blank ones only.
    """
    texts = list_of(where, record, field)
    checked = tuple(checked_text(where, field, text) for text in texts if not isinstance(text, str)
                    or text.strip())
    if not checked:
        raise ValueError(f"{where}: field {field!r} has no text")
    return checked


def checked_text(where: str, field: str, text: Any) -> str:
    """A text that is not blank and can be written as UTF-8.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: field {field!r} must be a text that is not blank; it is "
                         f"{text!r:.80}")
    require_whole(where, field, text)
    return text


def require_whole(where: str, field: str, text: str) -> None:
    """Raises a ValueError where a text has half of a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {field!r} has half of a surrogate pair, "
                         f"{text[error.start]!r}, at character {error.start} of it; mend or remove "
                         "that character") from None
