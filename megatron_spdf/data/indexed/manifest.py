"""Manifest of a preprocessed data set, and the check of a data set before training.

Imports neither torch nor Megatron: the check runs before any device is touched.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from megatron_spdf.data.indexed.index_file import (
    REBUILD,
    IndexHeader,
    check_index,
    read_index_header,
)
from megatron_spdf.data.preprocess.records import MAX_RECORD_BYTES, Skipped
from megatron_spdf.records.json_reader import read_json

CORPUS = "corpus.json"
NO_MANIFEST = f"it is not a manifest of format version 1. {REBUILD}"


class _Record(BaseModel):
    """Base of all records. Unknown fields, which an older or newer version may have written, are
    ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class TokenizerRecord(_Record):
    """Identity of the tokenizer that wrote the tokens. A copy of it lies in PREFIX.tokenizer."""

    kind: str
    vocab_size: int
    eod: int
    sha256: str


class PreprocessSettings(_Record):
    """Options of preprocessing that decide, with inputs and tokenizer, which tokens go where.

    Attributes:
        text_key: key of the text in a JSON record.
        on_error: "stop" or "skip", at a record that cannot be read.
        append_eod: end every document with the end-of-document token.
        max_document_bytes: longer records cannot be read.
        ftfy: pass texts through `ftfy.fix_text` first.
        deduplicate: of documents with the same text keep the first.
        split: shares of train, valid and test, by a hash of the text; None: no split.
        set_key: write a data set for each value of this key of "meta"; None: documents of all sets
            in one.
        per_shard: write a data set for each input file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_key: str = "text"
    on_error: str = "stop"
    append_eod: bool = True
    max_document_bytes: int = MAX_RECORD_BYTES
    ftfy: bool = False
    deduplicate: bool = False
    split: tuple[float, ...] | None = None
    set_key: str | None = None
    per_shard: bool = False

    @property
    def several(self) -> bool:
        """True if the output is a directory of data sets instead of one data set."""
        return self.split is not None or self.set_key is not None or self.per_shard


class InputFile(_Record):
    """Input file, and the counts of its records: records = documents + empty + skipped +
    duplicates.

    In the manifest of one data set of several, `documents` and the fields after it count what went
    into that data set; PREFIX/corpus.json counts all other records.

    Attributes:
        size: bytes on disk; `sha256` is over them.
        tokens, text_bytes: counts over the documents written; text in UTF-8.
        bin_sha256: checksum of their tokens, which lie in PREFIX.bin in the order of the sources.
    """

    path: str
    size: int
    sha256: str | None = None
    records: int | None = None
    documents: int
    empty: int = 0
    skipped: int = 0
    duplicates: int = 0
    tokens: int | None = None
    text_bytes: int | None = None
    bin_sha256: str | None = None


class Counts(_Record):
    """Counts of one data set of several."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class _Origin(_Record):
    """Origin of data. The same command on the same files gives the same record, byte for byte.

    Attributes:
        documents: number of documents; this package writes one sequence for each.
        tokens: number of tokens, end-of-document tokens included.
        text_bytes: UTF-8 bytes of the documents' text.
        empty: records left out because they give no token.
        skipped: records left out because they could not be read; `skipped_lines` lists the first
            1,000.
        duplicates: records left out because their text was there before.
        versions: of the libraries that read, tokenized and wrote.
    """

    format_version: Literal[1] = 1
    tokenizer: TokenizerRecord | None = None
    settings: PreprocessSettings | None = None
    documents: int
    tokens: int
    text_bytes: int | None = None
    empty: int = 0
    skipped: int = 0
    duplicates: int = 0
    sources: list[InputFile] = []
    skipped_lines: list[Skipped] = []
    versions: dict[str, str] = {}


class Manifest(_Origin):
    """Content of a data set PREFIX.bin, PREFIX.idx, kept in PREFIX.json.

    A data set made by another tool has no such file. Its manifest is made up from the .idx file,
    and fields that the .idx file does not give are None.

    Attributes:
        append_eod: each document ends with the end-of-document token.
        split, set_name: identify one data set of several.
        dtype: NumPy name of the type of a token in PREFIX.bin.
        bin_bytes, idx_bytes: sizes of the two files.
        idx_sha256: checksum of PREFIX.idx; that of PREFIX.bin is kept source by source.
    """

    append_eod: bool | None = None
    split: str | None = None
    set_name: str | None = None
    dtype: str
    bin_bytes: int
    idx_bytes: int
    idx_sha256: str | None = None

    @property
    def content_sha256(self) -> str | None:
        """Fingerprint of the tokens, whatever their path. None if the checksums are unknown."""
        if self.idx_sha256 is None:
            return None
        parts = [self.idx_sha256, *(source.bin_sha256 for source in self.sources
                                    if source.bin_sha256)]
        return hashlib.sha256(f"{self.dtype} {' '.join(parts)}".encode()).hexdigest()


class CorpusManifest(_Origin):
    """Content of a directory of data sets, in all and in each, kept in PREFIX/corpus.json."""

    data_sets: dict[str, Counts]


def file_of(prefix: str | Path, suffix: str) -> Path:
    """Path PREFIX.suffix. A dot in the prefix's own name is kept."""
    return Path(f"{prefix}.{suffix}")


def read_manifest(prefix: str | Path) -> Manifest:
    """Reads the manifest in PREFIX.json.

    Raises:
        ValueError: it is missing, not a manifest, or of an unknown format version.
    """
    path = file_of(prefix, "json")
    try:
        return read_json(path, Manifest, remedy=NO_MANIFEST)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, so the data set is incomplete. {REBUILD}") from None


def read_corpus(prefix: str | Path) -> CorpusManifest:
    """Reads the manifest of a directory of data sets.

    Raises:
        ValueError: it is missing, or not a manifest of a directory.
    """
    path = Path(prefix) / CORPUS
    try:
        return read_json(path, CorpusManifest, remedy=NO_MANIFEST)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, so {prefix} is no directory of data sets, or incomplete"
        ) from None


def check_prefix(prefix: str | Path, tokenizer_sha256: str | None = None) -> Manifest:
    """Checks that the data set at `prefix` is whole, not empty, and made with the tokenizer in use.

    A data set with neither PREFIX.json nor PREFIX.tokenizer was made by another tool, such as
    Megatron-LM's: its sizes are checked against its own .idx file, and its tokenizer cannot be
    checked; `tokens.look_at_ids` looks at its ids instead.

    Args:
        prefix: path of the data set without .bin and .idx.
        tokenizer_sha256: `Tokenizer.sha256` of the tokenizer in use; None leaves that unchecked.

    Raises:
        ValueError: the data set is missing, incomplete, empty, of another tokenizer, or its index
            does not fit.
        PermissionError: a file of it may not be read.
    """
    idx, data = file_of(prefix, "idx"), file_of(prefix, "bin")
    for path in (data, idx):
        if not path.is_file():
            raise ValueError(f"data set {prefix} has no file {path}. {_other_prefix(prefix)}, or "
                             "make the data set with tools/preprocess_data.py")
        open(path, "rb").close()  # whoever may not read it learns that now
    header = read_index_header(idx)
    _require_size(idx, header.file_bytes, "its header")
    if not header.sequences:
        raise ValueError(f"data set {prefix} holds no document. Make it from input that has text")
    foreign = is_foreign(prefix)
    tokens = int(check_index(idx).lengths.sum(dtype=np.int64))
    manifest = _describe_foreign(tokens, header) if foreign else read_manifest(prefix)
    source = idx if foreign else file_of(prefix, "json")
    _require_size(data, manifest.bin_bytes, source)
    _require_size(idx, manifest.idx_bytes, source)
    if not tokens:
        raise ValueError(f"data set {prefix} holds no token. Make it from input that has text")
    if manifest.tokens != tokens:
        raise ValueError(f"{idx} counts {tokens:,} tokens, and {source} says {manifest.tokens:,}. "
                         f"{REBUILD}")
    recorded = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if tokenizer_sha256 and recorded and recorded != tokenizer_sha256:
        raise ValueError(
            f"data set {prefix} was made with the tokenizer {recorded}, and the run uses "
            f"{tokenizer_sha256} (sha256). Use the copy in {file_of(prefix, 'tokenizer')}, or "
            "preprocess the text again"
        )
    return manifest


def _other_prefix(prefix: str | Path) -> str:
    """What to write in place of a prefix that names no data set."""
    stem, dot, suffix = str(prefix).rpartition(".")
    if dot and suffix in ("bin", "idx") and file_of(stem, suffix).is_file():
        return f"The prefix of that file is {stem}; write it so"
    bare = str(prefix).rstrip(os.sep)
    if bare != str(prefix) and file_of(bare, "idx").is_file():
        return f"There is a data set {bare}, without the {os.sep}; write it so"
    return "Correct the prefix"


def is_foreign(prefix: str | Path) -> bool:
    """True if a data set was made by another tool: nothing beside it says what it holds."""
    return not file_of(prefix, "json").exists() and not file_of(prefix, "tokenizer").exists()


def _describe_foreign(tokens: int, header: IndexHeader) -> Manifest:
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
        raise ValueError(
            f"{path} is {state}: {size} bytes, and {source} says {expected}. {REBUILD}"
        )
