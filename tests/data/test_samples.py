"""Samples and windows: every token once an epoch, in an order that depends on nothing it should not
depend on."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_shards import records, write_shard

from megatron_spdf.data.indexed.tokens import DataFault
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.pretraining import dataset, samples
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.data.pretraining.index_cache import built_once
from megatron_spdf.data.pretraining.samples import (
    DocumentBoundaries,
    ShuffledEpochs,
    Windows,
    epochs_per_index,
    samples_per_index,
)
from megatron_spdf.data.pretraining.sources import expand, training_sources
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer
from megatron_spdf.resilience.signals import block_in_worker

LENGTH = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_bpe) -> Path:
    """Data sets "a" and "b" of some 10,000 and 4,000 tokens."""
    directory = tmp_path_factory.mktemp("samples")
    for name, count, seed in (("a", 40, 1), ("b", 14, 2)):
        write_shard(directory / f"{name}.jsonl", records(count, seed))
        preprocess([directory / f"{name}.jsonl"], directory / name, load_tokenizer(tiny_bpe))
    return directory


@pytest.fixture
def tokenizer(tiny_bpe):
    return load_tokenizer(tiny_bpe)


@pytest.fixture
def make(place, recipe, tmp_path, tokenizer):
    """Makes the pass `number` over data set "a", with changes to the recipe."""
    def make_pass(number: int = 0, prefix: Path | None = None, cache: str = "cache",
                  **changes) -> ShuffledEpochs:
        made = recipe(data={"train": str(prefix or place / "a")},
                      **{"train": {"sequence_length": LENGTH}, **changes})
        [source] = training_sources(expand(made.data), tokenizer.sha256)
        return ShuffledEpochs(source, number, made, tokenizer, tmp_path / cache)
    return make_pass


def texts(dataset) -> np.ndarray:
    """(samples, T + 1)."""
    return np.stack([np.append(s["tokens"], s["labels"][-1])
                     for s in (dataset[i] for i in range(len(dataset)))])


def stored(prefix: Path) -> np.ndarray:
    return np.fromfile(f"{prefix}.bin", np.uint16)


def test_a_pass_of_one_epoch_is_megatrons(make, place, tokenizer, tmp_path, monkeypatch):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    monkeypatch.setattr(samples, "_LEAST_SAMPLES", 1)
    ours = make()
    config = GPTDatasetConfig(
        random_seed=ours.config.random_seed, sequence_length=LENGTH,
        blend=([str(place / "a")], None), split="1,0,0", path_to_cache=str(tmp_path / "theirs"),
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False)
    data = IndexedDataset(str(place / "a"))
    theirs = GPTDataset(data, str(place / "a"), np.arange(len(data), dtype=np.int32), None,
                        Split.train, config)
    assert len(ours) == len(theirs) == (len(stored(place / "a")) - 1) // LENGTH
    for i in range(len(ours)):
        sample, expected = ours[i], theirs[i]
        assert set(sample) == set(expected)
        assert all(torch.equal(sample[key], expected[key]) for key in expected)


def test_seed_pass_and_content_each_give_another_order(make, place, tmp_path, monkeypatch):
    """Two data sets of as many documents, so that nothing but the order could be alike."""
    monkeypatch.setattr(samples, "_LEAST_SAMPLES", 1)
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{place}/a.{suffix}", f"{tmp_path}/copy.{suffix}")
    shutil.copytree(place / "a.tokenizer", tmp_path / "copy.tokenizer")
    manifest = tmp_path / "copy.json"
    manifest.write_text(re.sub('"bin_sha256": ?"[0-9a-f]{2}', '"bin_sha256": "00',
                               manifest.read_text()))
    made = [make(), make(number=1), make(seed=5), make(prefix=tmp_path / "copy")]
    assert len({one.document_index.tobytes() for one in made}) == len(made)
    assert len({one.shuffle_index.tobytes() for one in made}) == len(made)


def test_another_length_has_an_index_of_its_own(make, place, monkeypatch):
    """Also where one epoch is an index of either, as of a large source."""
    monkeypatch.setattr(samples, "_LEAST_SAMPLES", 1)
    for length in (LENGTH, LENGTH // 2, 3 * LENGTH, LENGTH):
        made = make(train={"sequence_length": length})
        assert len(made) == (len(stored(place / "a")) - 1) // length
        assert texts(made).shape == (len(made), length + 1)


@pytest.mark.parametrize("asked", [1, 2, 1000])
def test_an_evaluation_is_of_whole_batches_and_of_no_more_than_there_is(recipe, place, tokenizer,
                                                                        tmp_path, asked):
    made = recipe(model={"vocab_size": 300}, evaluate={"batches": asked},
                  train={"sequence_length": LENGTH, "global_batch": 8},
                  data={"train": str(place / "a"), "valid": [str(place / "a"), str(place / "b")]})
    data = TokenData(made, check_corpus(made), tmp_path, reads=True)
    windows = sum((len(stored(place / name)) - 1) // LENGTH for name in "ab")
    assert data.valid_batches == min(asked, windows // 8) and len(data.valid) == (
        8 * data.valid_batches)
    labels = [token for window in range(len(data.valid))
              for token in data.valid[window]["labels"].tolist()]
    size = sum(tokenizer.text_bytes([token]) for token in labels)
    assert data.valid_tokens_per_byte == pytest.approx(len(labels) / size)


@pytest.mark.parametrize(("size", "replicas"), [(4, 1), (2, 3), (1, 4), (3, 2)])
def test_micro_batches_of_a_step_are_dealt_to_the_replicas_in_turn(recipe, place, tmp_path,
                                                                   monkeypatch, size, replicas):
    """Sample by sample, as a table of steps would be read: first micro-batches of all replicas."""
    made = recipe(model={"vocab_size": 300}, parallel={"data": replicas}, data={
        "train": str(place / "a")}, train={"sequence_length": LENGTH, "micro_batch": size,
                                          "global_batch": 2 * size * replicas})
    data, dealt = TokenData(made, check_corpus(made), tmp_path, reads=True), []
    for step in (0, 1, 5):
        for micro in range(2):
            for replica in range(replicas):
                monkeypatch.setattr(dataset.ps, "get_data_parallel_rank", lambda r=replica: r)
                dealt += data._indices(step, micro)
    of_step = 2 * size * replicas
    assert dealt == [step * of_step + n for step in (0, 1, 5) for n in range(of_step)]


@pytest.mark.parametrize(("workers", "ahead"), [(0, None), (3, 4)])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_whole_of_what_makes_a_loader(recipe, place, tmp_path, monkeypatch, workers, ahead,
                                          gpu):
    """Of the last two steps of a run, on the second of two replicas; the micro-batches of two
    steps are ready in each of its processes."""
    made = recipe(model={"vocab_size": 300}, parallel={"data": 2}, data={
        "train": str(place / "a"), "workers": workers}, train={
            "sequence_length": LENGTH, "micro_batch": 2, "global_batch": 8})
    loaders = []
    monkeypatch.setattr(dataset, "DataLoader", lambda samples, **settings: (
        loaders.append((samples, settings)) or ["one", "two"] * 2))
    monkeypatch.setattr(dataset.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(dataset.ps, "get_data_parallel_rank", lambda: 1)
    data, begin = TokenData(made, check_corpus(made), tmp_path, reads=True), made.steps - 2
    assert list(data.training_batches(begin)) == [["one", "two"]] * 2
    ((samples, settings),) = loaders
    first = 8 * begin
    assert list(settings.pop("batch_sampler")) == [
        [first + at, first + at + 1] for at in (2, 6, 10, 14)]
    assert samples._samples is data._samples
    assert settings == {"num_workers": workers, "collate_fn": dataset._collate,
                        "worker_init_fn": block_in_worker, "prefetch_factor": ahead,
                        "pin_memory": gpu}


@pytest.mark.parametrize(("rank", "expected"), [
    (0, ["built", "barrier"]), (1, ["barrier", "built"]), (None, ["built"])])
@pytest.mark.parametrize("fails", [False, True])
def test_rank_0_builds_indices_before_the_others(
        monkeypatch, rank, expected, fails):
    happened = []
    monkeypatch.setattr(dataset.dist, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(dataset.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dataset.dist, "barrier", lambda: happened.append("barrier"))
    with suppress(OSError), dataset._rank_0_first() as alone:
        assert alone == (rank != 1)
        happened.append("built")
        if fails:
            raise OSError
    assert happened == expected


def test_labels_are_the_next_tokens_and_every_one_counts(make):
    sample = make()[3]
    assert torch.equal(sample["labels"][:-1], sample["tokens"][1:])
    assert torch.equal(sample["loss_mask"], torch.ones(LENGTH))
    assert torch.equal(sample["position_ids"], torch.arange(LENGTH))


@pytest.mark.parametrize("least", [1, 2000])
def test_every_epoch_holds_every_document_and_ends_before_the_next(make, place, monkeypatch, least):
    monkeypatch.setattr(samples, "_LEAST_SAMPLES", least)
    made = make()
    tokens = len(stored(place / "a"))
    epochs = max(1, least // ((tokens - 1) // LENGTH))
    assert len(made.document_index) == epochs * len(made.dataset)
    for epoch in made.document_index.reshape(epochs, -1):
        assert sorted(epoch) == list(range(len(made.dataset)))
    assert len({tuple(epoch) for epoch in made.document_index.reshape(epochs, -1)}) == epochs
    # A sequence is of the epoch it starts in: their numbers, in the order they are drawn in, go up
    # epoch by epoch.
    epoch_of = np.asarray(made.shuffle_index, np.int64) * LENGTH // tokens
    assert (np.diff(epoch_of) >= 0).all() and sorted(made.shuffle_index) == list(range(len(made)))
    assert len(made) == (epochs * tokens - 1) // LENGTH
    inputs = texts(made)[:, :-1].ravel()
    counts = np.bincount(stored(place / "a"), minlength=300) * epochs
    dropped = counts - np.bincount(inputs, minlength=300)
    assert dropped.sum() == epochs * tokens - len(inputs) <= LENGTH and (dropped >= 0).all()


@pytest.mark.parametrize(("tokens", "epochs", "number"), [
    (1601, 655, 65_540), (16 * 32_768 + 1, 2, 65_536), (16 * 32_769 + 1, 1, 32_769),
    (16 * 200_000, 1, 199_999)])
def test_epochs_of_a_small_source_share_an_index_of_some_65536_samples(recipe, tokens, epochs,
                                                                       number):
    """Of 100 sequences of 16 tokens 655 epochs do; a stored order of samples depends on it."""
    source = SimpleNamespace(tokens=tokens)
    made = recipe(train={"sequence_length": 16})
    assert epochs_per_index(source, made) == epochs
    assert samples_per_index(source, made) == number


def test_the_order_depends_on_seed_content_and_number_alone(make, place, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_LEAST_SAMPLES", 500)
    first = texts(make())
    for suffix in ("bin", "idx", "json"):
        shutil.copy(place / f"a.{suffix}", tmp_path / f"moved.{suffix}")
    shutil.copytree(place / "a.tokenizer", tmp_path / "moved.tokenizer")
    assert (texts(make(prefix=tmp_path / "moved", cache="another")) == first).all()
    assert (texts(make(optimizer={"lr": 0.5}, parallel={"data": 4})) == first).all()
    others = [make(number=1), make(seed=9), make(prefix=place / "b")]
    for other in others:
        assert len(other) != len(first) or (texts(other) != first).any()


def test_windows_are_the_text_in_order_whatever_the_seed(place, recipe, tokenizer):
    def windows(count: int, **changes) -> Windows:
        made = recipe(train={"sequence_length": LENGTH},
                      data={"train": [str(place / n) for n in "ab"]}, **changes)
        return Windows(training_sources(expand(made.data), tokenizer.sha256), count, made,
                       tokenizer)

    streams = [stored(place / name).astype(np.int64) for name in "ab"]
    plain = [text[i : i + LENGTH + 1] for text in streams
             for i in range(0, len(text) - LENGTH, LENGTH)]
    everything = texts(windows(len(plain)))
    assert (everything == np.stack(plain)).all() and (texts(windows(len(plain), seed=9))
                                                      == everything).all()
    even = [len(plain) * i // 20 for i in range(20)]
    assert (texts(windows(20)) == np.stack(plain)[even]).all()


def test_bytes_of_the_windows_are_those_of_the_text(place, recipe, tokenizer):
    made = recipe(train={"sequence_length": LENGTH}, data={"train": [str(place / "a")]})
    [source] = training_sources(expand(made.data), tokenizer.sha256)
    count = (source.tokens - 1) // LENGTH
    windows = Windows([source], count, made, tokenizer)
    labels = stored(place / "a")[1 : count * LENGTH + 1]
    text = tokenizer._encoding.decode_bytes([int(i) for i in labels if i != tokenizer.eod])
    assert windows.text_bytes == len(text)


@pytest.mark.parametrize("text", [
    [5, 6, 7, 8, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1], [2, 1, 3, 4, 1, 2, 1], [1, 2, 3, 3, 3, 3, 1]])
def test_boundaries_of_documents_are_megatrons(text):
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from megatron_spdf.model.attention import document_mask

    boundaries = DocumentBoundaries(eod=1, reset_positions=True, reset_attention=True)
    sample = boundaries.sample(np.array(text, np.uint16))
    masked, loss_mask, positions = _get_ltor_masks_and_position_ids(sample["tokens"], 1, True,
                                                                    True, False, True)
    assert torch.equal(sample["position_ids"], positions)
    assert torch.equal(sample["loss_mask"], loss_mask)
    assert torch.equal(document_mask(sample["documents"][None])[0], ~masked)
    plain = DocumentBoundaries(eod=1).sample(np.array(text, np.uint16))
    assert torch.equal(plain["position_ids"], torch.arange(6)) and "documents" not in plain


def _build_slowly(directory: Path) -> None:
    with open(directory.parent / "builds", "a") as log:
        log.write("x")
    (directory / "part").write_text("1")
    time.sleep(0.3)
    (directory / "rest").write_text("2")


def _want(cache: Path) -> None:
    place = built_once(cache, "key", _build_slowly)
    assert {f.name for f in place.iterdir()} == {"part", "rest"}


def test_of_many_processes_one_builds(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    several = [multiprocessing.get_context("fork").Process(target=_want, args=(cache,))
               for _ in range(6)]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0] * 6
    assert (cache / "builds").read_text() == "x"


def test_what_a_killed_builder_left_is_neither_used_nor_kept(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    builder = multiprocessing.get_context("fork").Process(target=_want, args=(cache,))
    builder.start()
    while not list(cache.glob("*.partial/part")):
        assert builder.is_alive()
        time.sleep(0.01)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert list(cache.glob("*.partial")) and not (cache / "key").exists()
    _want(cache)
    assert {path.name for path in cache.iterdir()} == {"builds", "key", "key.lock"}


def test_where_nodes_share_no_locks_the_first_to_finish_wins(tmp_path):
    def build(directory: Path) -> None:
        (directory / "mine").write_text("second")
        (tmp_path / "key").mkdir()  # another node, meanwhile
        (tmp_path / "key" / "theirs").write_text("first")

    place = built_once(tmp_path, "key", build)
    assert [f.name for f in place.iterdir()] == ["theirs"]
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.lock"}


def test_a_failed_build_is_not_taken_for_a_result(tmp_path):
    def fail(directory: Path) -> None:
        (directory / "part").write_text("1")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataFault, match="No space left"):
        built_once(tmp_path, "key", fail)
    assert not (tmp_path / "key").exists()
    assert built_once(tmp_path, "key",
                      lambda directory: (directory / "whole").touch()) == tmp_path / "key"


def test_length_of_a_pass_without_opening_it(make, recipe, place, tokenizer):
    made = recipe(train={"sequence_length": LENGTH}, data={"train": str(place / "a")})
    [source] = training_sources(expand(made.data), tokenizer.sha256)
    assert samples_per_index(source, made) == len(make())


def test_no_room_in_either_place_is_bad_input(tmp_path):
    def build(place: Path) -> None:
        raise OSError("126504 requested and 25568 written")  # as NumPy says it

    with pytest.raises(DataFault, match="neither the index cache .*cache nor .*126504 requested"):
        built_once(tmp_path / "cache", "key", build)


@pytest.mark.parametrize("how", ["full", "no directory", "linked lock"])
def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_directory(tmp_path, capsys, how):
    cache = tmp_path / "cache"
    if how == "no directory":
        cache.touch()
    elif how == "linked lock":
        cache.mkdir()
        (cache / "key.lock").symlink_to(tmp_path / "victim")

    def build(place: Path) -> None:
        if how == "full" and place.is_relative_to(cache):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (place / "index").write_text("index")

    place = built_once(cache, "key", build)
    assert (place / "index").read_text() == "index" and not place.is_relative_to(cache)
    assert f"the index cache {cache} cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "victim").exists()
