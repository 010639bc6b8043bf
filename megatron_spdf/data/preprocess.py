"""Text shards to Megatron's indexed dataset: PREFIX.bin, PREFIX.idx, with PREFIX.json and PREFIX.tokenizer.

Each shard is tokenized to an indexed dataset of its own, and these are appended in the order of the inputs.
All is written in PREFIX.partial and renamed at the end, the manifest last, so that what lies under the final
names is complete.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_spdf.data.documents import (
    MAX_RECORDED_SKIPS,
    ReadReport,
    Skipped,
    expand_inputs,
    read_shard,
)
from megatron_spdf.data.manifest import (
    Manifest,
    Source,
    TokenizerRecord,
    check_prefix,
    file_of,
    read_index_header,
    read_manifest,
)
from megatron_spdf.data.tokenizer import Tokenizer

__all__ = ["Manifest", "ShardResult", "check_prefix", "preprocess", "read_manifest", "tokenize_shard"]

_LIBRARIES = ("megatron-core", "numpy", "sentencepiece", "tiktoken", "tokenizers", "zstandard")
# The order in which files go away and come in: at no moment do an old and a new file look like one data set.
_REMOVE_ORDER = ("json", "idx", "bin", "tokenizer")
_PUBLISH_ORDER = ("tokenizer", "bin", "idx", "json")


@dataclass(frozen=True)
class ShardResult:
    """What tokenizing one shard gave; `tokens` and `text_bytes` are those of the documents written."""

    source: Source
    tokens: int
    text_bytes: int
    skipped_lines: list[Skipped]


# Told of every document what it adds: bytes read, bytes of text, documents, tokens.
Advance = Callable[[int, int, int, int], None]


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    on_error: str = "stop",
    append_eod: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Manifest:
    """Tokenize `inputs` to the data set `prefix` and return its manifest, which is also in PREFIX.json.

    A run that fails or is interrupted before its last step, the renaming, leaves what was under the final
    names, and nothing else.

    Args:
        inputs: files or glob patterns, as in `documents.expand_inputs`.
        text_key: key of the text in a JSON record.
        on_error: "stop" or "skip", as in `documents.iterate_documents`.
        append_eod: end every document with the tokenizer's end-of-document token.
        overwrite: replace a data set of this name.
        progress: show a bar on stderr; None shows it on a terminal only.

    Raises:
        ValueError: bad input or arguments, no document at all, or `prefix` in use.
    """
    paths = expand_inputs(inputs)
    require_free(prefix, overwrite)
    with _partial_directory(prefix) as partial:
        data_set, part = partial / "set", partial / "part"
        results: list[ShardResult] = []
        with _new_data_set(data_set, tokenizer) as merged, _frozen_heap(), _Bar(paths, progress) as bar:
            start = time.perf_counter()
            for path in paths:
                result = tokenize_shard(
                    path,
                    part,
                    tokenizer,
                    text_key=text_key,
                    on_error=on_error,
                    append_eod=append_eod,
                    advance=bar.advance,
                )
                merged.add_index(str(part))
                results.append(result)
        manifest = _describe(data_set, tokenizer, append_eod, results, time.perf_counter() - start)
        tokenizer.save(file_of(data_set, "tokenizer"))
        file_of(data_set, "json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _publish(data_set, prefix)
    return manifest


def tokenize_shard(
    path: Path,
    part: Path,
    tokenizer: Tokenizer,
    *,
    text_key: str,
    on_error: str,
    append_eod: bool,
    advance: Advance,
) -> ShardResult:
    """Tokenize one file to the indexed dataset `part`.bin, `part`.idx: one sequence for each document.

    A document that gives no token is left out. Knows of no other shard, so that several processes can share
    the work.
    """
    report = ReadReport()
    bytes_read = text_bytes = documents = tokens = 0
    with _new_data_set(part, tokenizer) as data_set:
        for document in read_shard(path, text_key, on_error, report):
            ids = tokenizer.encode_array(document.text)
            if not len(ids):
                continue
            sequence = np.append(ids, tokenizer.eod) if append_eod else ids
            data_set.add_document(sequence, [len(sequence)])
            text_size = len(document.text.encode("utf-8", "surrogatepass"))
            advance(report.bytes_read - bytes_read, text_size, 1, len(sequence))
            bytes_read = report.bytes_read
            text_bytes, documents, tokens = text_bytes + text_size, documents + 1, tokens + len(sequence)
    advance(report.bytes_read - bytes_read, 0, 0, 0)
    assert report.seen == report.documents + report.empty + report.skipped
    source = Source(
        path=str(path),
        size=path.stat().st_size,
        documents=documents,
        empty=report.empty + report.documents - documents,
        skipped=report.skipped,
    )
    return ShardResult(source, tokens, text_bytes, report.skipped_lines)


def require_free(prefix: str | Path, overwrite: bool) -> None:
    """Raise a ValueError if `prefix` is a directory, or names a data set and `overwrite` is false."""
    if str(prefix).endswith(os.sep):
        raise ValueError(f"output {prefix} is a directory; add the start of the file names: {prefix}train")
    files = [file_of(prefix, suffix) for suffix in _PUBLISH_ORDER]
    existing = ", ".join(str(file) for file in files if file.exists())
    if existing and not overwrite:
        raise ValueError(f"output exists: {existing}. Choose another prefix, or pass --overwrite")


@contextmanager
def _partial_directory(prefix: str | Path) -> Iterator[Path]:
    """PREFIX.partial for the files in the making; removed at the end, it keeps a second run out till then."""
    partial = file_of(prefix, "partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{partial} exists: another run is writing this data set, or one was killed. "
            "If none is running, remove that directory"
        ) from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial)


@contextmanager
def _new_data_set(prefix: Path, tokenizer: Tokenizer) -> Iterator:
    """Megatron's builder for `prefix`.bin, which writes `prefix`.idx at the end unless an error ends it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron tells at import which optional libraries it misses
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    # The rule of Megatron's GPTDatasetConfig.token_dtype_code. Its DType.optimal_dtype takes int32 from
    # 65,500 ids on, which a reader that trusts the former would misread.
    dtype = np.uint16 if tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1 else np.int32
    builder = IndexedDatasetBuilder(str(file_of(prefix, "bin")), dtype=dtype)
    try:
        yield builder
        builder.finalize(str(file_of(prefix, "idx")))
    finally:
        builder.data_file.close()


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep what the imports made out of the garbage collection that Megatron's `add_index` does each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _describe(
    data_set: Path, tokenizer: Tokenizer, append_eod: bool, results: Sequence[ShardResult], seconds: float
) -> Manifest:
    """The manifest, once the files are found to hold what the shards are said to have given."""
    sources = [result.source for result in results]
    skipped_lines = [line for result in results for line in result.skipped_lines]
    manifest = Manifest(
        created=datetime.now(UTC),
        tokenizer=TokenizerRecord(
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            sha256=tokenizer.sha256,
        ),
        append_eod=append_eod,
        documents=sum(source.documents for source in sources),
        tokens=sum(result.tokens for result in results),
        text_bytes=sum(result.text_bytes for result in results),
        seconds=seconds,
        dtype=read_index_header(file_of(data_set, "idx")).dtype,
        bin_bytes=file_of(data_set, "bin").stat().st_size,
        idx_bytes=file_of(data_set, "idx").stat().st_size,
        empty=sum(source.empty for source in sources),
        skipped=sum(source.skipped for source in sources),
        sources=sources,
        skipped_lines=skipped_lines[:MAX_RECORDED_SKIPS],
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
    )
    if not manifest.documents:
        raise ValueError(
            f"no document in the inputs: {manifest.empty} empty records, {manifest.skipped} skipped. "
            "Check --input and --text-key"
        )
    assert read_index_header(file_of(data_set, "idx")).sequences == manifest.documents
    assert manifest.bin_bytes == manifest.tokens * np.dtype(manifest.dtype).itemsize
    return manifest


def _publish(data_set: Path, prefix: str | Path) -> None:
    """Move the finished files to their names, in place of those of an older data set."""
    for suffix in _REMOVE_ORDER:
        old = file_of(prefix, suffix)
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    for suffix in _PUBLISH_ORDER:
        os.replace(file_of(data_set, suffix), file_of(prefix, suffix))


class _Bar:
    """Progress by bytes of the input files, which are known beforehand, with the speed in text and tokens."""

    def __init__(self, paths: Sequence[Path], show: bool | None):
        total = sum(path.stat().st_size for path in paths)
        disable = None if show is None else not show
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, desc="input", disable=disable, mininterval=interval
        )
        self._text_bytes = self._documents = self._tokens = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_) -> None:
        self._show_speed()
        self._bar.close()

    def advance(self, bytes_read: int, text_bytes: int, documents: int, tokens: int) -> None:
        self._text_bytes += text_bytes
        self._documents += documents
        self._tokens += tokens
        if self._bar.update(bytes_read):
            self._show_speed()

    def _show_speed(self) -> None:
        if self._bar.disable:
            return
        seconds = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(
            f"text {self._text_bytes / 1e6 / seconds:.1f} MB/s, "
            f"{self._documents / seconds:,.0f} documents/s, {self._tokens:,} tokens"
        )
