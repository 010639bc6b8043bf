"""Reads and writes Megatron's .idx file, the index of a .bin file of tokens.

The file holds a header, the length and byte offset of each sequence, and the document list: the
number of the sequence at which each document starts, and one more entry for the end.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_spdf.files import new_file

REBUILD = "Run tools/preprocess_data.py again, or copy the file again if it was copied"
# Magic, version, dtype code, sequences, length of the document list.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32",
           8: "uint16"}
_CODES = {name: code for code, name in _DTYPES.items()}
_WHOLE_NUMBERS = tuple(name for name in _DTYPES.values() if "int" in name)
_BYTES_PER_SEQUENCE = 4 + 8  # int32 length, int64 offset
_BYTES_PER_DOCUMENT = 8
_ENTRIES = 1 << 20  # that are in memory at a time


class IndexHeader(NamedTuple):
    """Header of a .idx file.

    Attributes:
        dtype: NumPy name of the type of a token in the .bin file.
        sequences: number of sequences.
        documents: number of documents; Megatron's document list is one entry longer.
    """

    dtype: str
    sequences: int
    documents: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole .idx file."""
        per_sequence = self.sequences * _BYTES_PER_SEQUENCE
        return _HEADER.size + per_sequence + (self.documents + 1) * _BYTES_PER_DOCUMENT


def read_index_header(path: Path) -> IndexHeader:
    """Reads the header of a .idx file.

    Raises:
        ValueError: the file is shorter than a header, its magic, version or dtype is not
            Megatron's, or the dtype is none of whole numbers.
    """
    with open(path, "rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size:
        raise ValueError(f"{path} is cut off: {len(start)} bytes; its header has {_HEADER.size}. "
                         f"{REBUILD}")
    magic, version, code, sequences, document_list = _HEADER.unpack(start)
    if magic != _MAGIC or version != 1 or code not in _DTYPES or document_list < 1:
        raise ValueError(
            f"{path} is not an index of Megatron: it starts with {magic!r}, version {version}, "
            f"dtype code {code}; expected {_MAGIC!r}, version 1, a code in 1..8. {REBUILD}"
        )
    if _DTYPES[code] not in _WHOLE_NUMBERS:
        raise ValueError(f"{path} is the index of {_DTYPES[code]} numbers, and token ids are whole "
                         f"numbers: {', '.join(_WHOLE_NUMBERS)}")
    return IndexHeader(_DTYPES[code], sequences, document_list - 1)


class Index(NamedTuple):
    """Arrays of a .idx file, memory-mapped.

    Attributes:
        lengths: (sequences,) int32, tokens of each sequence.
        offsets: (sequences,) int64, byte at which each sequence starts in the .bin file.
        document_ends: (documents + 1,) int64, sequences before the end of each document, after a
            leading 0.
    """

    lengths: np.ndarray
    offsets: np.ndarray
    document_ends: np.ndarray


def read_index(path: Path) -> Index:
    """Maps the arrays of a .idx file, whose size the caller has checked."""
    header = read_index_header(path)
    mapped, offset, arrays = np.memmap(path, np.uint8, "r"), _HEADER.size, []
    for dtype, count in ((np.int32, header.sequences), (np.int64, header.sequences),
                         (np.int64, header.documents + 1)):
        arrays.append(np.frombuffer(mapped, dtype, count, offset))
        offset += arrays[-1].nbytes
    return Index(*arrays)


def check_index(path: Path) -> Index:
    """Maps the arrays of a .idx file, whose size the caller has checked, if they go together.

    Raises:
        ValueError: a length is negative, the offsets do not follow from the lengths, or the
            document list does not cover the sequences in order.
    """
    index, size = read_index(path), np.dtype(read_index_header(path).dtype).itemsize
    count, documents, offset = len(index.lengths), index.document_ends, 0
    for start in range(0, count, _ENTRIES):
        lengths = index.lengths[start : start + _ENTRIES]
        ends = offset + np.cumsum(lengths, dtype=np.int64) * size
        if (lengths < 0).any() or (index.offsets[start : start + _ENTRIES]
                                   != ends - lengths.astype(np.int64) * size).any():
            raise ValueError(f"{path}: its offsets do not follow from its lengths. {REBUILD}")
        offset = int(ends[-1])
    steps = (np.diff(documents[start : start + _ENTRIES + 1])
             for start in range(0, len(documents), _ENTRIES))
    first, last = int(documents[0]), int(documents[-1])
    if first != 0 or last != count or any((step < 0).any() for step in steps):
        raise ValueError(f"{path}: its document list goes from sequence {first:,} to {last:,} and "
                         f"must cover its {count:,} sequences in order, from 0 on; old tools that "
                         "merge data sets leave such lists. Merge again with a newer one")
    return index


def tokens_of_documents(path: Path) -> np.ndarray:
    """Counts the tokens of every document, (documents,) int64; a document may have none."""
    index = read_index(path)
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    return np.diff(ends[index.document_ends])


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> str:
    """Writes the .idx file of documents of one sequence each, in little memory.

    Args:
        lengths: (documents,) int32, tokens of each document; may be memory-mapped.
        dtype: type of a token in the .bin file.

    Returns:
        SHA-256 of the file, in hexadecimal.
    """
    digest = hashlib.sha256()
    path.unlink(missing_ok=True)  # of a start that was interrupted
    with new_file(path) as file:
        for piece in _pieces(lengths, dtype):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """Yields the bytes of the file in order, at most `_ENTRIES` entries at a time."""
    count = len(lengths)
    yield _HEADER.pack(_MAGIC, 1, _CODES[dtype.name], count, count + 1)
    starts = range(0, count, _ENTRIES)
    yield from (lengths[i : i + _ENTRIES].tobytes() for i in starts)
    offset = 0
    for i in starts:
        ends = offset + np.cumsum(lengths[i : i + _ENTRIES], dtype=np.int64) * dtype.itemsize
        yield np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes()
        offset = int(ends[-1])
    for i in range(0, count + 1, _ENTRIES):
        yield np.arange(i, min(i + _ENTRIES, count + 1), dtype=np.int64).tobytes()
