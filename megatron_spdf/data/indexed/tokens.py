"""Tokens of an indexed data set, read piece by piece; what is not a token is refused where it is
read.

The .bin file is read and not mapped: where a mapped file is cut off under a running job, the
process dies of SIGBUS without a word. The .idx file is mapped, since all processes of a node share
it, and its size is looked at before every use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_spdf.data.indexed.index_file import REBUILD, read_index, read_index_header
from megatron_spdf.data.indexed.manifest import file_of

PIECE_TOKENS = 1 << 18  # that are read at a time
_LOOKED_AT = 64  # pieces of a data set before a run: 16 M tokens


class DataFault(ValueError):
    """A data set that cannot be read further, or holds what is no token."""


class NoToken(DataFault):
    """A data set that holds what is no token of the vocabulary, wherever it is read."""


class IndexedTokens:
    """Tokens of a checked data set, with the interface of Megatron-Core's IndexedDataset.

    Args:
        prefix: of the data set.
        vocab_size: ids are under it; None: any id from 0 on is one.

    Attributes:
        tokens: number of all.
        sequence_lengths: (sequences,) int32, tokens of each.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None):
        self.path_prefix, self._vocab_size = str(prefix), vocab_size
        self._bin, self._idx = (open(file_of(prefix, s), "rb") for s in ("bin", "idx"))  # noqa: SIM115
        self.dtype = np.dtype(read_index_header(file_of(prefix, "idx")).dtype)
        index = read_index(file_of(prefix, "idx"))
        self.sequence_lengths, self._offsets = index.lengths, index.offsets
        self._idx_bytes = os.fstat(self._idx.fileno()).st_size
        self.tokens = os.fstat(self._bin.fileno()).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, number: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens of a sequence, by default all, from its token `offset` on.

        Raises:
            DataFault: see `read`.
        """
        self.require_whole_index()
        if length is None:
            length = int(self.sequence_lengths[number]) - offset
        return self.read(int(self._offsets[number]) // self.dtype.itemsize + offset, int(length))

    def read(self, first: int, count: int) -> np.ndarray:
        """`count` tokens from the data set's token `first` on, (count,).

        Raises:
            DataFault: the file ends before, or (`NoToken`) an id is none of the vocabulary; names
                the file.
        """
        ids = np.empty(count, self.dtype)
        if not count:
            return ids
        left, place = memoryview(ids).cast("B"), first * self.dtype.itemsize
        try:
            while len(left) and (read := os.preadv(self._bin.fileno(), [left], place)):
                left, place = left[read:], place + read
        except OSError as error:
            raise DataFault(f"{self._bin.name} cannot be read any more: {error}") from None
        if len(left):
            size = os.fstat(self._bin.fileno()).st_size
            raise DataFault(f"{self._bin.name} ends at byte {size:,}, and token {first + count:,} "
                            f"lies behind that: it was cut off after the start. {REBUILD}")
        self._require_known(ids, first)
        return ids

    def require_whole_index(self) -> None:
        """Raises a DataFault where the .idx file has another size than when it was opened."""
        try:
            size = os.fstat(self._idx.fileno()).st_size
        except OSError as error:
            raise DataFault(f"{self._idx.name} cannot be read any more: {error}") from None
        if size != self._idx_bytes:
            raise DataFault(f"{self._idx.name} has {size:,} bytes and had {self._idx_bytes:,}: it "
                            f"was changed after the start. {REBUILD}")

    def _require_known(self, ids: np.ndarray, first: int) -> None:
        # read as unsigned, a negative id is over every limit
        limit = np.iinfo(self.dtype).max + 1 if self._vocab_size is None else self._vocab_size
        unsigned = ids.view(f"u{self.dtype.itemsize}")
        if unsigned.max() < limit:
            return
        place = int(np.flatnonzero(unsigned >= limit)[0])
        known = ("a token id is 0 or more" if self._vocab_size is None
                 else f"the tokenizer has the ids 0 to {self._vocab_size - 1:,}")
        raise NoToken(f"{self._bin.name}, token {first + place:,}: id {int(ids[place])}, and "
                      f"{known}; name the tokenizer that the data set was made with, or make the "
                      "data set again")


def pieces(tokens: IndexedTokens, at_most: int | None = None) -> Iterator[np.ndarray]:
    """Reads a data set from start to end, or `at_most` pieces at even distances."""
    starts = range(0, tokens.tokens, PIECE_TOKENS)
    chosen = range(len(starts)) if at_most is None or len(starts) <= at_most else (
        number * len(starts) // at_most for number in range(at_most))
    for number in chosen:
        yield tokens.read(starts[number], min(PIECE_TOKENS, tokens.tokens - starts[number]))


def look_at_ids(prefix: str | Path, vocab_size: int) -> None:
    """Reads a data set of up to 16 million tokens whole, and as much of a larger one.

    Raises:
        NoToken: an id is none of the vocabulary.
    """
    for _ in pieces(IndexedTokens(prefix, vocab_size), _LOOKED_AT):
        pass
