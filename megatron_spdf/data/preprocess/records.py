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
from typing import BinaryIO, ClassVar

from backports import zstd

ON_ERROR = ("stop", "skip")
MAX_RECORDED_SKIPS = 1000
# Larger than any document of the Pile; a record must fit in memory several times over.
MAX_RECORD_BYTES = 100_000_000
_BUFFER_BYTES = 1 << 20
# What a reader skips of a record that is too long, in limits of one, before it gives the file up.
_MOST_TIMES = 10
_BOM = b"\xef\xbb\xbf"  # at the start of a line too, where files with one were joined
_MOST_BLANK = 1_000_000  # lines in a row


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record left out: the file, the line or row (counted from 1) and what was wrong with it."""

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
        place = "row" if path.suffix == ".parquet" else "line"
        raise ValueError(
            f"{path}, {place} {line}: {reason}. Correct the file, or leave such records out with "
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
    read_before, seen_before, line, blank = report.bytes_read, report.seen, 0, 0
    with open(path, "rb", buffering=0) as raw:
        file = _HashedFile(raw)
        try:
            for line, (record, size) in enumerate(_pieces(file, path, max_bytes), 1):
                report.bytes_read = read_before + file.position
                if record.isspace():
                    blank += 1
                    if blank > _MOST_BLANK:
                        raise _Bomb(f"more than {_MOST_BLANK:,} blank lines in a row")
                    continue
                blank = 0
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
            what = "" if isinstance(error, _Bomb) else "damaged or cut off "
            after = isinstance(error, gzip.BadGzipFile) and line > 0
            reason = (f"{what}near byte {file.position} of {path.stat().st_size}: "
                      f"{'behind the last gzip member: ' if after else ''}{error}")
            reject(path, line + 1, f"{reason}; nothing after this line is read", on_error, report)
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
                if size > _MOST_TIMES * max_bytes:
                    raise _Bomb(f"a record of more than {size - 1:,} bytes, {_MOST_TIMES} times "
                                f"the limit of {max_bytes:,} (--max-document sets it)")
                if not whole and piece.endswith(b"\n"):
                    size -= 1
                    break
        yield record if whole and not first else record.removeprefix(_BOM), size
        first = False


def _decompress(file: _HashedFile, path: Path) -> io.BufferedIOBase:
    if path.suffix in (".zst", ".gz") and path.stat().st_size == 0:
        raise EOFError("the file is empty, which no compressed file is")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFrames(file), _ZstdFrames._CHUNK)
    if path.suffix == ".gz":  # another buffer around it would lose what precedes the damage
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(file, _BUFFER_BYTES)


class _Bomb(Exception):
    """What little bytes are to become is more than any text is; says what."""


_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError, _Bomb)


class _ZstdFrames(io.RawIOBase):
    """What the frames of a .zst file decompress to, one after the other.

    A frame may refer back by as much as it declares, up to 2 GiB (`zstd --long=31`), and memory
    grows with what comes out until then. So a frame that declares more than zstd's own default must
    not come out larger than text does.
    """

    _CHUNK = 1 << 17  # compressed bytes that are read at a time
    _USUAL_WINDOW = 1 << 27  # zstd's own limit, without --long
    _MOST_TIMES_LARGER = 200
    _LARGEST_HEADER = 18
    _OPTIONS: ClassVar = {zstd.DecompressionParameter.window_log_max: 31}

    def __init__(self, file: BinaryIO):
        self._file, self._decoder, self._window, self._taken, self._made = file, None, 0, 0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            fed = b""
            if self._decoder is None or self._decoder.eof:
                if not (fed := self._start_frame()):
                    return 0
            elif self._decoder.needs_input and not (fed := self._file.read(self._CHUNK)):
                raise EOFError("the file ends inside of a zstd frame")
            if made := self._decompress(fed, len(buffer)):
                buffer[: len(made)] = made
                return len(made)

    def _start_frame(self) -> bytes:
        """Makes a decoder for the next frame and returns its first bytes; none at the file's
        end."""
        head = self._decoder.unused_data if self._decoder else b""
        while len(head) < self._LARGEST_HEADER and (more := self._file.read(self._CHUNK)):
            head += more
        if head:
            self._window, self._taken, self._made = _window_of(head), 0, 0
            self._decoder = zstd.ZstdDecompressor(options=self._OPTIONS)
        return head

    def _decompress(self, fed: bytes, most: int) -> bytes:
        self._taken += len(fed)
        made = self._decoder.decompress(fed, most)
        self._made += len(made)
        limit = self._USUAL_WINDOW + self._MOST_TIMES_LARGER * self._taken
        if self._window > self._USUAL_WINDOW and self._made > limit:
            raise _Bomb(f"a zstd frame with a window of {self._window:,} bytes, of which "
                        f"{self._taken:,} bytes become more than {limit:,}: no text is that small")
        return made


def _window_of(frame: bytes) -> int:
    """Bytes that a zstd frame may refer back by, from its first 18 bytes (RFC 8878, 3.1.1.1); 0
    where it is no frame of data.

    Raises:
        zstd.ZstdError: the frame is cut off in its header.
    """
    if int.from_bytes(frame[:4], "little") != 0xFD2FB528 or len(frame) < 6:
        return 0
    if frame[4] & 0b10_0000:  # a single segment: all of the content
        return zstd.get_frame_info(frame[:18]).decompressed_size
    exponent, eighths = frame[5] >> 3, frame[5] & 7
    return (1 << 10 + exponent) // 8 * (8 + eighths)


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
