"""The manifest of a preprocessed data set, and the check of a data set before training.

Imports neither torch nor Megatron: the check runs before any device is touched.
"""

from __future__ import annotations

import struct
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_spdf.data.documents import Skipped

# Megatron's header of a .idx file: magic, version, dtype code, sequences, length of the document list.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_INDEX_BYTES_PER_SEQUENCE = 4 + 8  # int32 length, int64 offset
_INDEX_BYTES_PER_DOCUMENT = 8
_REBUILD = "Run tools/preprocess_data.py again, or copy the file again if it was copied"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecord(_Record):
    """The tokenizer that wrote the tokens; a copy of it lies in PREFIX.tokenizer."""

    kind: str
    vocab_size: int
    eod: int
    sha256: str


class Source(_Record):
    """One input file: its size in bytes on disk and what became of its records."""

    path: str
    size: int
    documents: int
    empty: int
    skipped: int


class Manifest(_Record):
    """What a data set PREFIX.bin, PREFIX.idx holds; kept in PREFIX.json.

    A data set made by another tool has no such file. Its manifest is then made up from the .idx file, and
    what that does not tell is None.

    Attributes:
        documents: in the data set; this package writes one sequence for each.
        tokens: tokens in it, end-of-document tokens included.
        text_bytes: UTF-8 bytes of the documents' text.
        append_eod: whether each document ends with the end-of-document token.
        dtype: NumPy name of the type of a token in PREFIX.bin.
        bin_bytes, idx_bytes: sizes of the two files.
        empty: records left out because they give no token.
        skipped: records left out because they could not be read; `skipped_lines` lists the first 1,000.
        seconds: wall time of reading, tokenizing and writing.
        versions: of the libraries that did so.
    """

    format_version: Literal[1] = 1
    created: datetime | None = None
    tokenizer: TokenizerRecord | None = None
    append_eod: bool | None = None
    documents: int
    tokens: int
    text_bytes: int | None = None
    seconds: float | None = None
    dtype: str
    bin_bytes: int
    idx_bytes: int
    empty: int = 0
    skipped: int = 0
    sources: list[Source] = []
    skipped_lines: list[Skipped] = []
    versions: dict[str, str] = {}


class IndexHeader(NamedTuple):
    """Start of a .idx file. Megatron's document list holds a leading 0, so `documents` is one less long."""

    dtype: str
    sequences: int
    documents: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole .idx file."""
        per_sequence = self.sequences * _INDEX_BYTES_PER_SEQUENCE
        return _HEADER.size + per_sequence + (self.documents + 1) * _INDEX_BYTES_PER_DOCUMENT


def file_of(prefix: str | Path, suffix: str) -> Path:
    """PREFIX.suffix; a dot in the prefix's own name is kept."""
    return Path(f"{prefix}.{suffix}")


def read_manifest(prefix: str | Path) -> Manifest:
    """The manifest in PREFIX.json.

    Raises:
        ValueError: it is missing, not a manifest, or of a format version that this code does not know.
    """
    path = file_of(prefix, "json")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, so the data set is incomplete. {_REBUILD}") from None
    except ValidationError as error:
        raise ValueError(f"{path} is not a manifest of format version 1: {error}. {_REBUILD}") from None


def read_index_header(path: Path) -> IndexHeader:
    """The header of a .idx file.

    Raises:
        ValueError: the file is shorter than a header, or its magic, version or dtype is not Megatron's.
    """
    with open(path, "rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size:
        raise ValueError(f"{path} is cut off: {len(start)} bytes; its header has {_HEADER.size}. {_REBUILD}")
    magic, version, code, sequences, document_list = _HEADER.unpack(start)
    if magic != _MAGIC or version != 1 or code not in _DTYPES or document_list < 1:
        raise ValueError(
            f"{path} is not an index of Megatron: it starts with {magic!r}, version {version}, dtype code "
            f"{code}; expected {_MAGIC!r}, version 1, a code in 1..8. {_REBUILD}"
        )
    return IndexHeader(_DTYPES[code], sequences, document_list - 1)


def check_prefix(prefix: str | Path, tokenizer_sha256: str | None = None) -> Manifest:
    """Check that the data set at `prefix` is whole, not empty, and made with the tokenizer in use.

    A data set with neither PREFIX.json nor PREFIX.tokenizer was made by another tool, such as Megatron-LM's:
    its sizes are checked against its own .idx file, and its tokenizer cannot be checked.

    Args:
        tokenizer_sha256: `Tokenizer.sha256` of the tokenizer in use; None leaves that unchecked.

    Raises:
        ValueError: with the file, what is wrong with it, and the remedy.
    """
    idx, data = file_of(prefix, "idx"), file_of(prefix, "bin")
    for path in (data, idx):
        if not path.is_file():
            raise ValueError(
                f"data set {prefix} has no file {path}. "
                "Correct the prefix, or make the data set with tools/preprocess_data.py"
            )
    header = read_index_header(idx)
    _require_size(idx, header.file_bytes, "its header")
    if not header.sequences:
        raise ValueError(f"data set {prefix} holds no document. Make it from input that has text")
    foreign = not file_of(prefix, "json").exists() and not file_of(prefix, "tokenizer").exists()
    manifest = _describe_foreign(idx, header) if foreign else read_manifest(prefix)
    source = idx if foreign else file_of(prefix, "json")
    _require_size(data, manifest.bin_bytes, source)
    _require_size(idx, manifest.idx_bytes, source)
    recorded = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if tokenizer_sha256 and recorded and recorded != tokenizer_sha256:
        raise ValueError(
            f"data set {prefix} was made with the tokenizer {recorded}, and the run uses {tokenizer_sha256} "
            f"(sha256). Use the copy in {file_of(prefix, 'tokenizer')}, or preprocess the text again"
        )
    return manifest


def _describe_foreign(idx: Path, header: IndexHeader) -> Manifest:
    lengths = np.memmap(idx, np.int32, mode="r", offset=_HEADER.size, shape=(header.sequences,))
    tokens = int(lengths.sum(dtype=np.int64))
    return Manifest(
        documents=header.documents,
        tokens=tokens,
        dtype=header.dtype,
        bin_bytes=tokens * np.dtype(header.dtype).itemsize,
        idx_bytes=header.file_bytes,
    )


def _require_size(path: Path, expected: int, source: object) -> None:
    size = path.stat().st_size
    if size != expected:
        state = "cut off" if size < expected else "too long"
        raise ValueError(f"{path} is {state}: {size} bytes, and {source} says {expected}. {_REBUILD}")
