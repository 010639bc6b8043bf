"""Batches of records to token ids: the work that several processes share."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_spdf.data.indexed.manifest import PreprocessSettings
from megatron_spdf.data.preprocess.documents import Document, parse_records, read_input
from megatron_spdf.data.preprocess.records import ReadReport, reject
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer

SPLITS = ("train", "valid", "test")
# Some 0.1 s of tokenizing: long beside what pass_through a batch to another process takes, short
# beside a shard.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of an input with their line numbers; `bytes_read` of the file at its
    end."""

    path: Path
    records: list[tuple[int, bytes]]
    size: int
    bytes_read: int


@dataclass(frozen=True)
class EndOfInput:
    """Comes after the batches of an input: what its reader counted, parsing apart."""

    path: Path
    report: ReadReport


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch, in order.

    Attributes:
        ids: (tokens,), in the type they are stored in.
        lengths: (documents,), tokens of each, the end-of-document token included.
        text_bytes: (documents,), UTF-8 bytes of the text of each.
        parts: the (split, set name) that occur in the batch, None where there is no such division.
        part_of: (documents,), which of `parts` each belongs to.
        digests: (documents,), 16 bytes of the SHA-256 of each text; empty unless duplicates are
            looked for.
        report: what parsing counted.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    parts: list[tuple[str | None, str | None]]
    part_of: np.ndarray
    digests: np.ndarray
    report: ReadReport

    DIGEST: ClassVar[np.dtype] = np.dtype("S16")


def read_batches(paths: Sequence[Path],
                 settings: PreprocessSettings) -> Iterator[RecordBatch | EndOfInput]:
    """The inputs as batches, each input's followed by its end. What batches hold does not depend on
    who encodes them.

    Raises:
        ValueError: under on_error="stop", damage; the records before it have been handed out.
    """
    keys = [key for key in (settings.text_key, settings.set_key) if key]
    for path in paths:
        report = ReadReport()
        records, size, failure = [], 0, None
        try:
            for line, record in read_input(path, keys, settings.on_error, report,
                                           settings.max_document_bytes):
                records.append((line, record))
                size += len(record)
                if size >= _BATCH_BYTES:
                    yield RecordBatch(path, records, size, report.bytes_read)
                    records, size = [], 0
        except ValueError as error:
            failure = error
        if records:
            yield RecordBatch(path, records, size, report.bytes_read)
        if failure:
            raise failure
        yield EndOfInput(path, report)


def token_dtype(vocab_size: int) -> type[np.number]:
    """The smallest type that holds every id, by the rule of Megatron's
    GPTDatasetConfig.token_dtype_code.

    Its DType.optimal_dtype takes int32 from 65,500 ids on, which a reader that trusts the former
    would misread.
    """
    return np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.int32


def split_bounds(shares: Sequence[float]) -> list[int]:
    """Ends of train, valid and test in the range of a 64-bit hash.

    Raises:
        ValueError: not two or three shares, one that is negative or no finite number, or none for
            train.
    """
    if len(shares) not in (2, 3) or not all(share >= 0 for share in shares) or not (
            0 < shares[0] <= sum(shares) < math.inf):
        raise ValueError(f"split {','.join(f'{s:g}' for s in shares)} is not train,valid[,test]; "
                         "write for example 98,1,1: shares that are not negative, and one for "
                         "train that is not 0")
    ends = np.cumsum(shares) / np.sum(shares)
    return [*(round(float(end) * 2**64) for end in ends[:-1]), 2**64]


@dataclass
class Encoder:
    """Parses and tokenizes a batch. Knows nothing of other batches, so that any process can have
    any batch."""

    tokenizer: Tokenizer
    settings: PreprocessSettings
    _bounds: list[int] = field(init=False)

    def __post_init__(self):
        self._bounds = split_bounds(self.settings.split) if self.settings.split else []

    def __call__(self, batch: RecordBatch) -> Encoded:
        report, settings = ReadReport(), self.settings
        ids, lengths, sizes, digests, part_of = [], [], [], [], []
        parts: dict[tuple[str | None, str | None], int] = {}
        end = np.array([self.tokenizer.eod] if settings.append_eod else [])
        for document in parse_records(batch.path, batch.records, settings.text_key,
                                      settings.on_error, report):
            name = self._set_name(document, report)
            if settings.set_key and not name:
                continue
            text = self._normalize(document.text)
            tokens = self.tokenizer.encode_array(text)
            if not len(tokens):
                report.documents -= 1
                report.empty += 1
                continue
            content = text.encode("utf-8", "surrogatepass")
            digest = (
                hashlib.sha256(content).digest() if self._bounds or settings.deduplicate else b""
            )
            ids += [tokens, end]
            lengths.append(len(tokens) + len(end))
            sizes.append(len(content))
            digests.append(digest[: Encoded.DIGEST.itemsize])
            part_of.append(parts.setdefault((self._split(digest), name), len(parts)))
        dtype = token_dtype(self.tokenizer.vocab_size)
        return Encoded(
            ids=np.concatenate(ids, dtype=dtype, casting="unsafe") if ids else np.empty(0, dtype),
            lengths=np.array(lengths, np.int32),
            text_bytes=np.array(sizes, np.int64),
            parts=list(parts),
            part_of=np.array(part_of, np.int32),
            digests=np.array(digests if settings.deduplicate else [], Encoded.DIGEST),
            report=report,
        )

    def _normalize(self, text: str) -> str:
        if not self.settings.ftfy:
            return text
        import ftfy

        return ftfy.fix_text(text)

    def _split(self, digest: bytes) -> str | None:
        """The first 8 bytes decide: a text's split changes with nothing but the shares."""
        if not self._bounds:
            return None
        number = int.from_bytes(digest[:8], "big")
        return next(name for name, end in zip(SPLITS, self._bounds, strict=False) if number < end)

    def _set_name(self, document: Document, report: ReadReport) -> str | None:
        key = self.settings.set_key
        if key is None:
            return None
        name = document.value(key)
        if isinstance(name, str) and file_name_of(name):
            return name
        report.documents -= 1
        reason = f"no set name in {key} or meta.{key}, by which data sets are made, but {name!r}"
        reject(document.path, document.line, reason, self.settings.on_error, report)
        return None


def file_name_of(set_name: str) -> str:
    """`Pile-CC` -> `pile_cc`, `Wikipedia (en)` -> `wikipedia_en`."""
    return re.sub(r"[^\w]+", "_", set_name.lower()).strip("_")
