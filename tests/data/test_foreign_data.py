"""Indexed data sets that another tool made, and files that change under a running job: what is not
sound is named before a device sees it, and what is only unusual is read."""

from __future__ import annotations

import importlib
import os
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from text_shards import ROOT
from torch.utils.data import DataLoader, get_worker_info

from megatron_spdf.data.indexed.inspect import describe, sample, verify
from megatron_spdf.data.indexed.manifest import check_prefix
from megatron_spdf.data.indexed.tokens import DataFault, IndexedTokens, look_at_ids, pieces
from megatron_spdf.data.pretraining import dataset
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.pretraining.samples import ShuffledEpochs, Windows
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer

CODES = {np.uint8: 1, np.int8: 2, np.int16: 3, np.int32: 4, np.int64: 5, np.float32: 7,
         np.uint16: 8}
EOD, LENGTH = 299, 16


def write(prefix: Path, documents: list[list[list[int]]], dtype=np.int32, ends=None,
          offsets=None, lengths=None) -> Path:
    """A data set of documents of sequences, byte by byte as Megatron's format says; what is given
    is written in place of what is right."""
    sequences = [sequence for document in documents for sequence in document]
    right = np.array([len(s) for s in sequences], np.int32)
    lengths = right if lengths is None else np.array(lengths, np.int32)
    if offsets is None:
        offsets = np.concatenate([[0], np.cumsum(right)[:-1]]) * np.dtype(dtype).itemsize
    if ends is None:
        ends = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(lengths), len(ends))
    Path(f"{prefix}.idx").write_bytes(head + lengths.tobytes()
                                      + np.asarray(offsets, np.int64).tobytes()
                                      + np.asarray(ends, np.int64).tobytes())
    np.array([i for s in sequences for i in s]).astype(dtype).tofile(f"{prefix}.bin")
    return prefix


def documents(count: int = 60, seed: int = 0) -> list[list[list[int]]]:
    draw = np.random.default_rng(seed)
    return [[[*draw.integers(0, 256, 30).tolist(), EOD]] for _ in range(count)]


SOUND = {
    "plain": documents(),
    "empty first": [[[]], *documents()],
    "empty last": [*documents(), [[]]],
    "empty in the middle": [*documents(9), [[]], [[]], *documents(9, 1)],
    "no sequence": [*documents(9), [], [], *documents(9, 1), []],
    "several sequences": [[d[0][:7], [], d[0][7:]] for d in documents()],
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_only_unusual_is_read_as_megatron_reads_it(tmp_path, tiny_bpe, name):
    prefix, tokenizer = write(tmp_path / "d", SOUND[name]), load_tokenizer(tiny_bpe)
    theirs, ours = IndexedDataset(str(prefix)), IndexedTokens(prefix, 300)
    assert len(theirs) == len(ours)
    for number in range(len(ours)):
        assert np.array_equal(theirs[number], ours.get(number))
        assert np.array_equal(theirs.get(number, offset=len(theirs[number]) // 2),
                              ours.get(number, offset=len(theirs[number]) // 2))
    assert verify(prefix, tokenizer) == [] == verify(prefix)
    flat = [[i for sequence in document for i in sequence] for document in SOUND[name]]
    facts = describe(prefix)
    assert sum(c["documents"] for c in facts["histogram"]) == len(flat)
    assert facts["tokens_per_document"]["min"] == min(map(len, flat))
    for number in (0, len(flat) // 2, len(flat) - 1):
        assert sample(prefix, number, tokenizer)["ids"] == flat[number]


@pytest.mark.parametrize("name", SOUND)
def test_an_epoch_over_it_holds_every_token(tmp_path, recipe, tiny_bpe, name):
    prefix, tokenizer = write(tmp_path / "d", SOUND[name]), load_tokenizer(tiny_bpe)
    made = recipe(train={"sequence_length": LENGTH}, model={"vocab_size": 300},
                  data={"train": str(prefix), "valid": str(prefix), "tokenizer": str(tiny_bpe)})
    corpus = check_corpus(made)
    [source] = corpus.train
    epochs = ShuffledEpochs(source, 0, made, tokenizer, tmp_path / "cache")
    stored = np.fromfile(f"{prefix}.bin", np.int32)
    per_epoch = (len(stored) - 1) // LENGTH
    first = np.concatenate([epochs[i]["tokens"] for i in range(per_epoch)])
    assert len(first) > len(stored) - 2 * LENGTH and first.max() == EOD
    windows = Windows(corpus.valid, per_epoch, made, tokenizer)
    read = np.concatenate([w["tokens"] for w in (windows[i] for i in range(per_epoch))])
    assert np.array_equal(read, stored[: len(read)])


def long(ids: list[int]) -> list[list[list[int]]]:
    return [*documents(), [[1, 2, *ids, EOD]]]


@pytest.mark.parametrize(("made", "said"), [
    (dict(documents=long([300])), "token 1,862: id 300, and the tokenizer has the ids 0 to 299"),
    (dict(documents=long([5000]), dtype=np.uint16), "id 5000"),
    (dict(documents=long([-3])), "token 1,862: id -3"),
    (dict(documents=long([-(2**40)]), dtype=np.int64), "id -1099511627776"),
    (dict(documents=long([2**40]), dtype=np.int64), "id 1099511627776"),
    (dict(documents=long([-1]), dtype=np.int16), "id -1"),
    (dict(documents=documents(), ends=range(31)), "from sequence 0 to 30 and must cover its 60"),
    (dict(documents=documents(), ends=[1, *range(1, 61)]), "from sequence 1 to 60"),
    (dict(documents=documents(), ends=[0, 40, 20, 60]), "from sequence 0 to 60 and must cover"),
    (dict(documents=documents(), ends=[0, 61]), "from sequence 0 to 61"),
    (dict(documents=documents(), ends=[]), "is not an index of Megatron"),
    (dict(documents=documents(3), lengths=[31, -31, 93]), "offsets do not follow"),
    (dict(documents=documents(3), offsets=[0, 4 * 31, 1 << 50]), "offsets do not follow"),
    (dict(documents=documents(3), lengths=[31, 31, 30]), "d.bin is too long"),
    (dict(documents=documents(3), lengths=[31, 31, 32]), "d.bin is cut off"),
    (dict(documents=documents(), dtype=np.float32), "index of float32 numbers"),
    (dict(documents=[[[]], [[]]]), "holds no token"),
])
@pytest.mark.parametrize("use", ["train", "valid"])
def test_what_is_not_sound_is_refused_before_a_device(tmp_path, recipe, tiny_bpe, made, said, use):
    bad, sound = write(tmp_path / "d", **made), write(tmp_path / "sound", documents(400, seed=5))
    data = {"train": str(sound), "valid": str(sound), "tokenizer": str(tiny_bpe), use: str(bad)}
    with pytest.raises(ValueError, match=said):
        check_corpus(recipe(data=data, model={"vocab_size": 300},
                            train={"sequence_length": LENGTH, "global_batch": 2}))
    assert [said in fault for fault in verify(bad, load_tokenizer(tiny_bpe))] == [True]


@pytest.mark.parametrize(("ids", "words", "code", "said"), [
    ([5000], [], 0, "whose ids are 0 to 5,000"),
    ([5000], ["--tokenizer"], 2, "id 5000, and the tokenizer has the ids 0 to 299"),
    ([-3], [], 2, "id -3, and a token id is 0 or more"),
    ([3], ["--tokenizer"], 0, "verified"),
])
def test_the_tool_does_not_call_verified_what_nobody_can_know(
        tmp_path, tiny_bpe, monkeypatch, capsys, ids, words, code, said):
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("inspect_data")
    words = [*words, str(tiny_bpe)] if words else []
    assert tool.main([str(write(tmp_path / "d", long(ids))), "--verify", *words]) == code
    out, err = capsys.readouterr()
    assert said in out + err and ("verified" in out) == (said == "verified")


def test_a_large_data_set_is_looked_at_in_all_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_spdf.data.indexed.tokens.PIECE_TOKENS", 10)
    monkeypatch.setattr("megatron_spdf.data.indexed.tokens._LOOKED_AT", 4)
    tokens = IndexedTokens(write(tmp_path / "d", [[list(range(200))]]), 200)
    assert np.array_equal(np.concatenate(list(pieces(tokens))), range(200))
    assert [int(piece[0]) for piece in pieces(tokens, 4)] == [0, 50, 100, 150]
    look_at_ids(tmp_path / "d", 160)  # the last piece of four ends before
    with pytest.raises(DataFault, match="id 159"):
        look_at_ids(tmp_path / "d", 159)


@pytest.fixture
def opened(tmp_path) -> tuple[Path, IndexedTokens]:
    prefix = write(tmp_path / "d", documents(4000))
    return prefix, IndexedTokens(prefix, 300)


def test_a_bin_file_that_is_cut_off_under_a_job_is_named(opened):
    prefix, tokens = opened
    os.truncate(f"{prefix}.bin", 1000)
    assert len(tokens.get(0)) == 31
    with pytest.raises(DataFault, match=rf"{prefix}.bin ends at byte 1,000, and token 4,000 lies"):
        tokens.read(0, 4000)
    with pytest.raises(DataFault, match="ends at byte 1,000, .*it was cut off after the start"):
        tokens.get(3999)


def test_an_index_that_is_cut_off_under_a_job_is_named(opened):
    prefix, tokens = opened
    os.truncate(f"{prefix}.idx", 100)
    with pytest.raises(DataFault, match=rf"{prefix}.idx has 100 bytes and had 80,04\d"):
        tokens.get(3999)


def test_files_that_are_removed_or_replaced_are_read_on(opened):
    prefix, tokens = opened
    before = tokens.get(3999)
    Path(f"{prefix}.bin").unlink()
    write(Path(f"{prefix}2"), documents(3))
    os.replace(f"{prefix}2.idx", f"{prefix}.idx")
    assert np.array_equal(tokens.get(3999), before)


class Sequences:
    """Samples of one sequence each."""

    def __init__(self, tokens: IndexedTokens, dies: bool = False):
        self.read_from, self._dies = [tokens], dies

    def __getitem__(self, number: int) -> dict:
        if self._dies and get_worker_info():
            os.kill(os.getpid(), signal.SIGBUS)
        return {"tokens": self.read_from[0].get(number)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("changed", "dies"), [("bin", False), ("idx", False), ("idx", True)])
def test_a_fault_crosses_from_a_loader_process_as_its_sentence(opened, workers, changed, dies):
    prefix, tokens = opened
    os.truncate(f"{prefix}.{changed}", 100)
    samples = Sequences(tokens, dies)
    loader = iter(DataLoader(dataset._FaultsInPlace(samples), batch_sampler=[[0, 3999]],
                             num_workers=workers, collate_fn=dataset._collate))
    with pytest.raises(DataFault) as caught:
        dataset._next(loader, samples)
    assert str(caught.value).startswith(f"{prefix}.{changed} ")


def test_reading_needs_no_torch(tmp_path):
    assert "torch" not in Path(sys.modules[IndexedTokens.__module__].__file__).read_text()
    assert check_prefix(write(tmp_path / "d", documents())).tokenizer is None


def test_data_that_moved_are_known_by_their_content(tmp_path, recipe, tiny_bpe, monkeypatch):
    def contents(train: str, valid: str) -> dict[str, str]:
        return check_corpus(recipe(
            data={"train": train, "valid": valid, "tokenizer": str(tiny_bpe)},
            model={"vocab_size": 300},
            train={"sequence_length": LENGTH, "global_batch": 2})).contents

    one, two = (str(write(tmp_path / name, documents(seed=seed)))
                for seed, name in enumerate(("one", "two")))
    before = contents(one, two)
    (tmp_path / "moved").mkdir()
    for path in tmp_path.glob("one.*"):
        path.rename(tmp_path / "moved" / path.name)
    monkeypatch.chdir(tmp_path)
    assert contents("moved/one", "two") == before
    assert contents("two", "two") | {"data.valid": before["data.valid"]} != before
    assert contents("moved/one", "moved/one")["data.valid"] != before["data.valid"]
