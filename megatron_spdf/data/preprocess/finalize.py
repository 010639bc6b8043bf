"""What completes data sets in the making: index, tokenizer and manifest of each, and the count of
all documents."""

from __future__ import annotations

import shutil

import numpy as np

from megatron_spdf.data.indexed.index_file import read_index_header, write_index
from megatron_spdf.data.indexed.manifest import (
    CORPUS,
    CorpusManifest,
    Counts,
    InputFile,
    Manifest,
    TokenizerRecord,
    file_of,
)
from megatron_spdf.data.preprocess.corpus_writer import require_balance
from megatron_spdf.data.preprocess.incremental import LENGTH, Journal
from megatron_spdf.data.preprocess.records import MAX_RECORDED_SKIPS
from megatron_spdf.data.preprocess.staging import Partial
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.files import write_file


def write_manifests(partial: Partial, ledger: Journal, tokenizer: Tokenizer) -> None:
    """Completes the data sets of a finished ledger, in `partial`.

    Raises:
        ValueError: there is no document in any.
        RuntimeError: what came in is not what is in the files and what was left out.
    """
    corpus = _describe_corpus(ledger, tokenizer)
    if not corpus.documents:
        raise ValueError(f"no document in the inputs: {corpus.empty} empty records, "
                         f"{corpus.skipped} skipped. Check --input and --text-key")
    for name, counts in corpus.data_sets.items():
        _finish(partial, ledger, corpus, name, counts, tokenizer)
    if partial.several:
        write_file(partial.tree / CORPUS, _as_json(corpus))


def _describe_corpus(ledger: Journal, tokenizer: Tokenizer) -> CorpusManifest:
    sources, data_sets = [entry.source for entry in ledger.finished], ledger.counts()
    for source in sources:
        require_balance(source)
    total = {key: sum(getattr(source, key) for source in sources)
             for key in ("documents", "tokens", "text_bytes", "empty", "skipped", "duplicates")}
    for key in ("documents", "tokens", "text_bytes"):
        _require_equal(f"{key} of the data sets together",
                       sum(getattr(c, key) for c in data_sets.values()), total[key])
    return CorpusManifest(
        tokenizer=TokenizerRecord(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size,
                                  eod=tokenizer.eod, sha256=tokenizer.sha256),
        settings=ledger.work.settings,
        **total,
        sources=sources,
        skipped_lines=[line for entry in ledger.finished
                       for line in entry.skipped_lines][:MAX_RECORDED_SKIPS],
        versions=ledger.work.versions,
        data_sets=dict(sorted(data_sets.items())),
    )


def _finish(
    partial: Partial, ledger: Journal, corpus: CorpusManifest, name: str, counts: Counts,
    tokenizer: Tokenizer
) -> None:
    base, dtype = partial.base_of(name), np.dtype(ledger.work.dtype)
    idx_sha256 = write_index(file_of(base, "idx"),
                             np.memmap(file_of(base, "lengths"), LENGTH, "r"), dtype)
    header, bin_bytes = read_index_header(file_of(base, "idx")), file_of(base, "bin").stat().st_size
    _require_equal(f"documents in {name or 'the data set'}", header.sequences, counts.documents)
    _require_equal(f"bytes of tokens in {name or 'the data set'}", bin_bytes,
                   counts.tokens * dtype.itemsize)
    split, set_name = ledger.part_of()[name]
    shared = {"tokenizer", "settings", "versions"}
    if not partial.several:
        shared |= {"empty", "skipped", "duplicates", "skipped_lines"}
    manifest = Manifest(
        **{key: getattr(corpus, key) for key in shared},
        **counts.model_dump(),
        sources=_sources_of(ledger, name, partial.several),
        append_eod=corpus.settings.append_eod,
        split=split,
        set_name=set_name,
        dtype=dtype.name,
        bin_bytes=bin_bytes,
        idx_bytes=header.file_bytes,
        idx_sha256=idx_sha256,
    )
    shutil.rmtree(file_of(base, "tokenizer"), ignore_errors=True)
    tokenizer.save(file_of(base, "tokenizer"))
    write_file(file_of(base, "json"), _as_json(manifest))


def _sources_of(ledger: Journal, name: str, several: bool) -> list[InputFile]:
    """The inputs of one data set; of several, those that gave it something, and what they gave."""
    sources = []
    for entry in ledger.finished:
        part = entry.parts.get(name)
        if part and several:
            sources.append(InputFile(path=entry.source.path, size=entry.source.size,
                                  sha256=entry.source.sha256,
                                  **part.model_dump()))
        elif not several:
            sources.append(entry.source.model_copy(update={"bin_sha256": part.bin_sha256 if part
                                                           else None}))
    return sources


def _require_equal(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"{what}: {found:,} in the files, and {expected:,} came in; no data set "
                           "is written")


def _as_json(record: Manifest | CorpusManifest) -> str:
    return record.model_dump_json(indent=2) + "\n"
