"""Encoded documents to the data sets they belong to, input by input."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_spdf.data.indexed.manifest import Counts, InputFile
from megatron_spdf.data.preprocess.deduplicate import DigestSet
from megatron_spdf.data.preprocess.documents import FORMATS
from megatron_spdf.data.preprocess.encode import Encoded, file_name_of
from megatron_spdf.data.preprocess.incremental import (
    AppendFile,
    FinishedInput,
    GrowingDataSet,
    Journal,
)
from megatron_spdf.data.preprocess.records import MAX_RECORDED_SKIPS, ReadReport
from megatron_spdf.data.preprocess.staging import Partial

_MOST_DATA_SETS = 1000  # two open files each


class CorpusWriter:
    """Appends documents to the data sets in `partial`, and finished inputs to their ledger.

    Args:
        partial: where the data sets are made.
        ledger: of the inputs finished before; what is not in it is removed.
    """

    def __init__(self, partial: Partial, ledger: Journal):
        self._partial, self._ledger = partial, ledger
        self._settings, self._dtype = ledger.work.settings, np.dtype(ledger.work.dtype)
        self._counts, self._part_of = ledger.counts(), ledger.part_of()
        self._remove_strays()
        self._open = {name: self._grow(name) for name in self._counts
                      if not self._settings.per_shard}
        self._seen, self._digests = None, None
        if self._settings.deduplicate:
            kept = sum(counts.documents for counts in self._counts.values())
            self._digests = AppendFile(partial.directory / "digests",
                                       kept * Encoded.DIGEST.itemsize)
            self._seen = DigestSet(np.fromfile(self._digests.path, Encoded.DIGEST))
        self._start_input()

    def add(self, path: Path, encoded: Encoded) -> Counts:
        """Takes in a batch of the input `path`; returns what is new of it."""
        self._report.documents += encoded.report.documents
        self._report.empty += encoded.report.empty
        self._report.skipped += encoded.report.skipped
        self._report.skipped_lines += encoded.report.skipped_lines
        kept = np.ones(len(encoded.lengths), bool)
        if self._seen:
            kept = self._seen.add(encoded.digests)
            self._digests.append(encoded.digests[kept])
            self._duplicates += int((~kept).sum())
        for number, part in enumerate(encoded.parts):
            self._append(path, part, encoded, kept & (encoded.part_of == number))
        tokens = int(encoded.lengths[kept].sum())
        return Counts(documents=int(kept.sum()), tokens=tokens,
                      text_bytes=int(encoded.text_bytes[kept].sum()))

    def end_input(self, path: Path, read: ReadReport, last: bool) -> None:
        """Notes that the input `path` is finished, of which `read` is what its reader counted."""
        parts = {name: data_set.end_input() for name, data_set in self._open.items()}
        parts = {name: part for name, part in parts.items() if part.documents}
        stat, documents = path.stat(), sum(part.documents for part in parts.values())
        lines = sorted(read.skipped_lines + self._report.skipped_lines,
                       key=lambda skipped: skipped.line)
        source = InputFile(
            path=str(path), size=stat.st_size, sha256=read.sha256, records=read.seen,
            documents=documents, empty=self._report.empty,
            skipped=read.skipped + self._report.skipped, duplicates=self._duplicates,
            tokens=sum(part.tokens for part in parts.values()),
            text_bytes=sum(part.text_bytes for part in parts.values()),
        )
        require_balance(source)
        files = [*self._open.values(), *([self._digests] if self._digests else [])]
        self._ledger.add(
            FinishedInput(
                source=source, mtime_ns=stat.st_mtime_ns, parts=parts,
                part_of={name: self._part_of[name] for name in parts},
                skipped_lines=lines[:MAX_RECORDED_SKIPS],
            ),
            files, last or self._settings.per_shard)
        if self._settings.per_shard:
            self.close()
        self._start_input()

    def close(self) -> None:
        for data_set in self._open.values():
            data_set.close()
        self._open = {}

    def _append(self, path: Path, part: tuple[str | None, str | None], encoded: Encoded,
                chosen: np.ndarray) -> None:
        if not chosen.any():
            return
        ids = encoded.ids if chosen.all() else encoded.ids[np.repeat(chosen, encoded.lengths)]
        self._data_set(path, part).append(ids, encoded.lengths[chosen],
                                          int(encoded.text_bytes[chosen].sum()))

    def _data_set(self, path: Path, part: tuple[str | None, str | None]) -> GrowingDataSet:
        split, set_name = part
        stem = stem_of(path) if self._settings.per_shard else None
        name = "/".join(p for p in (split, set_name and file_name_of(set_name), stem) if p)
        if self._part_of.setdefault(name, part) != part:
            raise ValueError(f"the sets {self._part_of[name][1]!r} and {set_name!r} would both be "
                             f"written to {self._partial.prefix}/{name}; rename one of them in the "
                             "input")
        if name not in self._open:
            if len(self._open) == _MOST_DATA_SETS:
                raise ValueError(f"more than {_MOST_DATA_SETS} sets by "
                                 f"meta.{self._settings.set_key}: {set_name!r} is one more; name a "
                                 "key with fewer values to --by-set")
            self._open[name] = self._grow(name)
        return self._open[name]

    def _grow(self, name: str) -> GrowingDataSet:
        return GrowingDataSet(self._partial.base_of(name), self._dtype,
                              self._counts.get(name, Counts()))

    def _remove_strays(self) -> None:
        """Data sets that only the input had which was cut off, and which may be another one now."""
        known = {self._partial.base_of(name) for name in self._counts}
        for file in self._partial.tree.rglob("*"):
            if file.is_file() and file.with_suffix("") not in known:
                file.unlink()

    def _start_input(self) -> None:
        self._report, self._duplicates = ReadReport(), 0


def stem_of(path: Path) -> str:
    """`shards/00.jsonl.zst` -> `00`."""
    return path.name[: -len(max((f for f in FORMATS if path.name.endswith(f)), key=len))]


def require_balance(source: InputFile) -> None:
    """Raise a RuntimeError unless every record of an input is accounted for."""
    out = source.documents + source.empty + source.skipped + source.duplicates
    if source.records != out:
        raise RuntimeError(f"{source.path}: {source.records} records in, but {source.documents} "
                           f"documents + {source.empty} empty + {source.skipped} skipped + "
                           f"{source.duplicates} duplicates = {out} out; this is a fault of the "
                           "program, and no data set is written")
