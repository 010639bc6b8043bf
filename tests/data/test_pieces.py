"""What is done piece by piece, to bound memory, is what it would be in one, wherever pieces end."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from test_foreign_data import write
from text_shards import records, write_shard

from megatron_spdf.data.indexed import index_file, inspect, tokens
from megatron_spdf.data.indexed.index_file import check_index, write_index
from megatron_spdf.data.indexed.inspect import highest_id, verify
from megatron_spdf.data.preprocess import encode
from megatron_spdf.data.preprocess.encode import EndOfInput, read_batches
from megatron_spdf.data.preprocess.preprocess import PreprocessSettings, preprocess
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7])
def test_an_index_is_the_formats_and_what_is_wrong_is_found_in_every_place(tmp_path, monkeypatch,
                                                                          count, dtype):
    """Three entries at a time. Of documents of 5, 3, 1, 6, 4, 2 tokens and none."""
    monkeypatch.setattr(index_file, "_ENTRIES", 3)
    lengths = (np.arange(1, count + 1) * 5 % 7).astype(np.int32)
    documents = [[[1] * length] for length in lengths]
    stored = Path(f"{write(tmp_path / 'theirs', documents, dtype)}.idx").read_bytes()
    digest = write_index(tmp_path / "ours.idx", lengths, np.dtype(dtype))
    assert (tmp_path / "ours.idx").read_bytes() == stored
    assert digest == hashlib.sha256(stored).hexdigest()
    assert np.array_equal(check_index(tmp_path / "ours.idx").lengths, lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    for place in range(count):
        other = write(tmp_path / "other", documents, dtype, offsets=offsets + (
            np.arange(count) == place))
        with pytest.raises(ValueError, match="offsets do not follow from its lengths"):
            check_index(Path(f"{other}.idx"))
    for place in range(1, count - 1):
        ends = np.arange(count + 1)
        ends[[place, place + 1]] = ends[[place + 1, place]]
        other = write(tmp_path / "other", documents, dtype, ends=ends)
        with pytest.raises(ValueError, match="must cover its .* sequences in order"):
            check_index(Path(f"{other}.idx"))


@pytest.fixture
def corpus(tmp_path, tiny_bpe) -> Path:
    """A data set of two inputs of four documents each."""
    inputs = [write_shard(tmp_path / f"{n}.jsonl", records(4, n)) for n in (1, 2)]
    preprocess(inputs, tmp_path / "text", load_tokenizer(tiny_bpe))
    return tmp_path / "text"


@pytest.mark.parametrize("size", [1, 7, 1 << 18])
def test_a_data_set_is_verified_to_its_last_token(corpus, monkeypatch, tiny_bpe, size):
    for module in (tokens, inspect):
        monkeypatch.setattr(module, "PIECE_TOKENS", size)
    whole, lengths = np.fromfile(f"{corpus}.bin", np.uint16), inspect.tokens_of_documents(
        Path(f"{corpus}.idx"))
    assert verify(corpus) == [] and highest_id(corpus) == whole.max()
    ends, eod = np.cumsum(lengths) - 1, load_tokenizer(tiny_bpe).eod
    assert len(ends) == 8 and (whole[ends] == eod).all()
    for place in (0, ends[0], ends[3], ends[3] + 1, len(whole) - 2, ends[7]):
        damaged, document = whole.copy(), int(np.searchsorted(ends, place))
        damaged[place] = eod if place not in ends else whole[0]
        damaged.tofile(f"{corpus}.bin")
        found = verify(corpus)
        which = (f"document {document} does not end with one" if place in ends
                 else "there are others")
        assert len(found) == 2 and found[0].endswith(which)
        assert found[1].endswith(f"than was made of {corpus.parent / str(1 + document // 4)}.jsonl")


def test_batches_of_records_are_the_records(tmp_path, monkeypatch):
    """Each with its line; a batch ends with the record that fills it, and with its input."""
    inputs = [write_shard(tmp_path / f"{n}.jsonl", records(5, n)) for n in (1, 2)]
    lines = [(path, number, line) for path in inputs
             for number, line in enumerate(path.read_bytes().splitlines(), 1)]
    for size in (1, 1000, 1 << 20):
        monkeypatch.setattr(encode, "_BATCH_BYTES", size)
        batches, read = [], []
        for path, items in itertools.groupby(read_batches(inputs, PreprocessSettings()),
                                             key=lambda item: item.path):
            *some, end = items
            assert isinstance(end, EndOfInput) and end.report.seen == 5
            assert end.report.bytes_read == path.stat().st_size
            batches.append(some)
            read += [(path, number, record.rstrip(b"\n")) for batch in some
                     for number, record in batch.records]
        assert read == lines
        for some in batches:
            sizes = [[len(record) for _, record in batch.records] for batch in some]
            assert [batch.size for batch in some] == [sum(each) for each in sizes]
            assert all(sum(each) >= size > sum(each[:-1]) for each in sizes[:-1])
            assert sum(sizes[-1][:-1]) < size
