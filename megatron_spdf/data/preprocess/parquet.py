"""The rows of Parquet files, as the JSON lines that they would be; needs the package pyarrow.

Pages are read one at a time and rows a few at a time, so that memory does not depend on the size of
a row group.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spdf.data.preprocess.records import ReadReport, reject

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
# Rows that are read at a time, their bytes as far as a row group tells, and bytes of the file.
_MOST_ROWS, _BATCH_BYTES, _BUFFER_BYTES = 1024, 8 << 20, 1 << 20


def require_pyarrow(path: Path) -> None:
    """Raise a ValueError where the package that reads `path` is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"input {path} needs the package pyarrow, which is not installed; pip "
                         "install pyarrow, or give the documents as JSON lines")


def read_rows(path: Path, keys: Sequence[str], on_error: str, report: ReadReport,
              max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and JSON object of each row of a file, as `records.read_records` gives lines.

    Args:
        keys: columns that are of interest; the first, of the text, must be there.
        on_error, report, max_bytes: see there.

    Raises:
        ValueError: under "stop", for what `read_records` raises one for; no column of the text.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    read_before, size, row = report.bytes_read, path.stat().st_size, 0
    try:
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            columns, total = _columns(file, keys), file.metadata.num_rows
            for row, record in enumerate(_records(file, columns), 1):
                report.bytes_read = read_before + size * row // total
                report.seen += 1
                if fault := _fault(record, max_bytes):
                    reject(path, row, fault, on_error, report)
                else:
                    yield row, record
            if not row:
                raise _Refused("the file holds no record")
    except _Refused as error:
        report.seen += 1
        reject(path, 1, str(error), on_error, report)
    except (pyarrow.ArrowException, OSError) as error:
        report.seen += 1
        what = str(error).partition("\n")[0].rstrip(". ")
        reject(path, row + 1, f"damaged or cut off: {what}; nothing from this row on is read",
               on_error, report)
    with open(path, "rb") as raw:
        report.sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    report.bytes_read = read_before + size


class _Refused(Exception):
    """Why nothing of a file can be read, in words for the user."""


def _columns(file: ParquetFile, keys: Sequence[str]) -> list[str]:
    """Columns of `keys` that the file has."""
    there = file.schema_arrow.names
    if keys[0] not in there:
        known = ", ".join(map(repr, there[:10])) or "none"
        raise _Refused(f"no column {keys[0]!r}; columns here: {known} (--text-key names the one to "
                       "take)")
    columns = [key for key in dict.fromkeys(keys) if key in there]
    if twice := [key for key in columns if there.count(key) > 1]:
        raise _Refused(f"more than one column {twice[0]!r}; give them different names")
    return columns


def _records(file: ParquetFile, columns: list[str]) -> Iterator[bytes | UnicodeDecodeError]:
    """JSON of the rows, or why one has none."""
    for batch in file.iter_batches(_rows_at_a_time(file), columns=columns, use_threads=False):
        values = [_values(batch.column(name)) for name in columns]
        for row in zip(*values, strict=True):
            yield _as_json(dict(zip(columns, row, strict=True)))


def _rows_at_a_time(file: ParquetFile) -> int:
    """Rows of a batch, by the group with the longest ones."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_MOST_ROWS, _BATCH_BYTES // max(1, longest)))


def _values(column: pyarrow.Array) -> list[Any]:
    """Python's values, or the errors of those that are not UTF-8."""
    try:
        return column.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="lossy")
    except UnicodeDecodeError as error:
        return error


def _as_json(row: dict[str, Any]) -> bytes | UnicodeDecodeError:
    """A row as JSON. Bytes are text, as older writers have it; a date and the like is its text."""
    try:
        row = {key: bytes(value).decode() if isinstance(value, bytes) else value
               for key, value in row.items()}
    except UnicodeDecodeError as error:
        return error
    bad = next((value for value in row.values() if isinstance(value, UnicodeDecodeError)), None)
    return bad or json.dumps(row, ensure_ascii=False, default=str).encode()


def _fault(record: bytes | UnicodeDecodeError, max_bytes: int) -> str:
    """What is wrong with a record; empty: nothing."""
    if isinstance(record, UnicodeDecodeError):
        return f"not UTF-8: 0x{record.object[record.start]:02x} at byte {record.start} of it"
    if len(record) > max_bytes:
        return (f"a record of {len(record):,} bytes, over the limit of {max_bytes:,} "
                "(--max-document sets it)")
    return ""
