"""Stream the records of JSON-lines shards (plain, .zst, .gz) and text files, as bytes.

A shard is never held in memory, and never silently shorter than it is: a file that ends too early,
or that cannot be read further, is an error that names the place, or is skipped on request and then
recorded.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from backports import zstd

ON_ERROR = ("stop", "skip")
MAX_RECORDED_SKIPS = 1000
# Larger than any document of the Pile; a record must fit in memory several times over.
MAX_RECORD_BYTES = 100_000_000
_BUFFER_BYTES = 1 << 20
# Shards written with `zstd --long=31` need this window; a frame allocates only what it declares.
_LARGEST_WINDOW = {zstd.DecompressionParameter.window_log_max: 31}
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError)


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
        seen: records, blank lines not counted; a file's unreadable rest, or a file without records,
            counts as one.
        documents: records handed out.
        empty: records whose text is "".
        skipped: records that could not be read.
        skipped_lines: the first 1,000 of those.
        bytes_read: bytes of the files as they are on disk, compressed ones compressed.
        sha256: of the last file that was read to its end, as it is on disk.
    """

    seen: int = 0
    documents: int = 0
    empty: int = 0
    skipped: int = 0
    skipped_lines: list[Skipped] = field(default_factory=list)
    bytes_read: int = 0
    sha256: str = field(default="", compare=False)

    def skip(self, path: Path, line: int, reason: str) -> None:
        self.skipped += 1
        if len(self.skipped_lines) < MAX_RECORDED_SKIPS:
            self.skipped_lines.append(Skipped(str(path), line, reason))


def reject(path: Path, line: int, reason: str, on_error: str, report: ReadReport) -> None:
    """Records a bad record in `report` under "skip".

    Raises:
        ValueError: under "stop".
    """
    if on_error == "stop":
        raise ValueError(
            f"{path}, line {line}: {reason}. Correct the file, or leave such records out with "
            "--on-error skip"
        )
    report.skip(path, line, reason)


def read_records(
    path: Path, on_error: str, report: ReadReport, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Line number (from 1) and bytes of each record of a file: a line of JSON lines, or a whole
    text file.

    Args:
        on_error: "stop" or "skip", for what shows without parsing: damage, a record of more than
            `max_bytes`, a file without records.
        report: counts all records in `seen`, and in `skipped` those left out here.

    Raises:
        ValueError: under "stop", with file, line and byte.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}; choose one of {ON_ERROR}")
    read_before, seen_before, line = report.bytes_read, report.seen, 0
    with open(path, "rb", buffering=0) as raw:
        file = _HashedFile(raw)
        try:
            for line, (record, size) in enumerate(_pieces(file, path, max_bytes), 1):
                report.bytes_read = read_before + file.position
                if record.isspace():
                    continue
                report.seen += 1
                if size <= max_bytes:
                    yield line, record
                else:
                    reason = (f"a record of {size:,} bytes, over the limit of {max_bytes:,} "
                              "(--max-document sets it)")
                    reject(path, line, reason, on_error, report)
            if report.seen == seen_before:
                report.seen += 1
                reject(path, 1, "the file holds no record", on_error, report)
        except _DAMAGE as error:
            report.seen += 1
            reason = (
                f"damaged or cut off near byte {file.position} of {path.stat().st_size}: {error}"
            )
            reject(path, line + 1, f"{reason}; nothing after this line can be read", on_error,
                   report)
        report.sha256 = file.digest_of_all()
        report.bytes_read = read_before + file.position


def _pieces(file: _HashedFile, path: Path, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(record, its size in bytes) in turn; of a record over `max_bytes` the start only."""
    stream = _decompress(file, path)
    whole = path.suffix == ".txt"
    read: Callable[[int], bytes] = stream.read if whole else stream.readline
    first = True
    while record := read(max_bytes + 1):
        size = len(record)
        if not whole and record.endswith(b"\n"):
            size -= 1
        elif size > max_bytes:
            while piece := read(_BUFFER_BYTES):
                size += len(piece)
                if not whole and piece.endswith(b"\n"):
                    size -= 1
                    break
        yield record.removeprefix(b"\xef\xbb\xbf") if first else record, size
        first = False


def _decompress(file: _HashedFile, path: Path) -> io.BufferedIOBase:
    if path.suffix in (".zst", ".gz") and path.stat().st_size == 0:
        raise EOFError("the file is empty, which no compressed file is")
    # Another buffer around these two would lose what precedes the damage.
    if path.suffix == ".zst":
        return zstd.ZstdFile(file, options=_LARGEST_WINDOW)
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(file, _BUFFER_BYTES)


class _HashedFile(io.RawIOBase):
    """A file that is read once from start to end, with the SHA-256 of its bytes."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._digest, self.position = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        self.position += count
        return count

    def digest_of_all(self) -> str:
        """SHA-256 of the file, read to its end where decompression stopped early."""
        while self.read(_BUFFER_BYTES):
            pass
        return self._digest.hexdigest()
