"""Text shards to Megatron's indexed dataset: PREFIX.bin, PREFIX.idx, with PREFIX.json and
PREFIX.tokenizer.

One process reads the inputs in turn and writes what the workers make of their batches, in order, so
that the tokens are appended once to where they stay, the result does not depend on the number of
workers, and memory does not depend on the size of the corpus. All is made in PREFIX.partial and
renamed at the end; after an interruption PREFIX.partial holds the finished inputs, and the same
call goes on from there.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_spdf.data.indexed.manifest import (
    CorpusManifest,
    Manifest,
    PreprocessSettings,
    check_prefix,
    read_corpus,
    read_manifest,
)
from megatron_spdf.data.preprocess.corpus_writer import CorpusWriter, stem_of
from megatron_spdf.data.preprocess.documents import expand_inputs
from megatron_spdf.data.preprocess.encode import Encoder, read_batches, token_dtype
from megatron_spdf.data.preprocess.finalize import write_manifests
from megatron_spdf.data.preprocess.incremental import Journal, Work
from megatron_spdf.data.preprocess.progress_bar import Bar
from megatron_spdf.data.preprocess.staging import Partial
from megatron_spdf.data.preprocess.workers import Workers
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.text import counted

__all__ = ["CorpusManifest", "Manifest", "check_prefix", "preprocess", "read_manifest",
           "usual_workers"]

_LIBRARIES = ("backports.zstd", "ftfy", "megatron-core", "numpy", "sentencepiece", "tiktoken",
              "tokenizers")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Starting a worker takes as long as tokenizing a few MB of text does.
_BYTES_WORTH_A_WORKER = 4 << 20


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer | Callable[[], Tokenizer],
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool | None = None,
    **settings,
) -> Manifest | CorpusManifest:
    """Tokenize `inputs` to the data set `prefix` and return its manifest, which is also in
    PREFIX.json.

    With a split, sets or shards apart, `prefix` is a directory of data sets, and PREFIX/corpus.json
    tells of them.

    A run that fails or is interrupted before its last step, the renaming, leaves what was under the
    final names, and beside it PREFIX.partial with the inputs it has finished, if any.

    Args:
        inputs: files or glob patterns, as in `documents.expand_inputs`.
        tokenizer: or what makes it, called when the place of the data set is taken.
        workers: processes that tokenize; 1: this one does all.
        overwrite: replace a data set of this name.
        progress: show a bar on stderr; None shows it on a terminal only.
        settings: fields of `manifest.PreprocessSettings`.

    Raises:
        ValueError: bad input or arguments, no document at all, `prefix` in use, or PREFIX.partial
            of other settings.
        OSError: of a full disk, with the remedy.
    """
    chosen = PreprocessSettings(**settings)
    paths = expand_inputs(inputs)
    _require_names_apart(paths, chosen)
    partial = Partial(prefix, chosen.several)
    with partial.opened(overwrite):
        made = tokenizer() if callable(tokenizer) else tokenizer
        _make(partial, paths, made, chosen, workers, progress)
        partial.publish()
    return read_corpus(partial.prefix) if chosen.several else read_manifest(prefix)


def usual_workers(paths: Sequence[Path]) -> int:
    """Workers that these inputs keep busy: at most one for each core of this process."""
    size = sum(path.stat().st_size for path in paths)
    return max(1, min(len(os.sched_getaffinity(0)), size // _BYTES_WORTH_A_WORKER))


def _make(
    partial: Partial, paths: list[Path], tokenizer: Tokenizer, settings: PreprocessSettings,
    workers: int, progress: bool | None
) -> None:
    """Everything of the data sets but their names."""
    work = Work(
        settings=settings,
        tokenizer_sha256=tokenizer.sha256,
        dtype=np.dtype(token_dtype(tokenizer.vocab_size)).name,
        versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
    )
    try:
        ledger = Journal(partial.directory, work)
        done = ledger.count_finished(paths)
        if partial.ready:
            return
        _tokenize(partial, ledger, paths, done, Encoder(tokenizer, settings), workers, progress)
        ledger.close()
        write_manifests(partial, ledger, tokenizer)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(error.errno,
                      f"{error.strerror}: the disk or quota of {partial.directory} is full. It "
                      f"keeps {partial.finished_inputs} of {counted(len(paths), 'input')}; make "
                      "room and run the same command again"
                      ) from None


def _tokenize(
    partial: Partial, ledger: Journal, paths: list[Path], done: int, encoder: Encoder, count: int,
    progress: bool | None
) -> None:
    """Brings the inputs after the first `done` into the data sets."""
    writer, workers = CorpusWriter(partial, ledger), Workers(encoder,
                                                             count if done < len(paths) else 1)
    try:
        with Bar(paths, done, progress) as bar:
            for item, encoded in workers.map(read_batches(paths[done:], encoder.settings)):
                if encoded:
                    bar.advance(item.bytes_read, writer.add(item.path, encoded))
                else:
                    bar.end_input(item.report.bytes_read)
                    writer.end_input(item.path, item.report, last=item.path == paths[-1])
    finally:
        workers.close()
        writer.close()


def _require_names_apart(paths: Sequence[Path], settings: PreprocessSettings) -> None:
    stem, times = Counter(map(stem_of, paths)).most_common(1)[0]
    if settings.per_shard and times > 1:
        same = ", ".join(str(path) for path in paths if stem_of(path) == stem)
        raise ValueError(f"--per-shard names data sets after inputs, and {times} are called "
                         f"{stem!r}: {same}. Rename them, or leave --per-shard out")
