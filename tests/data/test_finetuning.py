"""Fine-tuning batches: what is a token of what, what carries loss, and that no layout changes
it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from megatron_spdf.data.finetuning import completions
from megatron_spdf.data.finetuning.completions import CompletionData, tokenize
from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer

WORDS = ("the cheap restaurant near river serves food and is very good for families in city "
         "centre").split()
LAYOUTS = [{"data": 1}, {"data": 2}, {"data": 4}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer("bpe", [" ".join(WORDS)] * 3, 300,
                           tmp_path_factory.mktemp("tokenizer") / "bpe")


def sentence(draw, longest: int) -> str:
    return " ".join(draw.choice(WORDS, draw.integers(1, longest)))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A directory with 157 training and 23 validation records of very different lengths."""
    place, draw = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
    for split, count in (("train", 157), ("validation", 23)):
        lines = [json.dumps({"context": sentence(draw, 20), "completion": sentence(draw, 15)})
                 for _ in range(count)]
        (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return place


def one_record(place, context: str, completion: str):
    (place / "train.jsonl").write_text(json.dumps({"context": "a", "completion": "b"}) + "\n"
                                       + json.dumps({"context": context, "completion": completion})
                                       + "\n")
    return place


@pytest.fixture
def make_data(recipe, tokenizer, task):
    """The data of a replica; a step has 8 examples."""
    train, valid = (tokenize("jsonl", task, split, tokenizer, 64)
                    for split in ("train", "validation"))

    def make(replica: int = 0, seed: int = 1, micro_batch: int = 2, **parallel) -> CompletionData:
        steps = 5 * -(-len(train) // 8)
        made = recipe(seed=seed, model={"max_positions": 64}, parallel=parallel,
                      train={"tokens": steps * 8 * 64, "micro_batch": micro_batch})
        assert made.steps == steps
        return CompletionData(made, train, valid, pad=tokenizer.eod, replica=replica)
    return make


def rows(batch: list[dict]) -> list[tuple[int, ...]]:
    """The pairs of micro-batches: tokens and last label of every row that carries loss."""
    found = []
    for micro in batch:
        for tokens, labels, mask in zip(micro["tokens"], micro["labels"], micro["loss_mask"],
                                        strict=True):
            if mask.any():
                end = int(mask.nonzero().max()) + 1
                assert torch.equal(tokens[1:end], labels[: end - 1])
                found.append((*tokens[:end].tolist(), int(labels[end - 1])))
    return found


def global_batch(make_data, step: int, data: int, **options) -> list[tuple[int, ...]]:
    shares = [next(make_data(replica, data=data, **options).training_batches(step))
              for replica in range(data)]
    return sorted(row for share in shares for row in rows(share))


def test_a_pair_is_context_eod_blank_completion_eod(tmp_path, tokenizer):
    pairs = tokenize("jsonl", one_record(tmp_path, "the river", "is  good ."), "train", tokenizer,
                     64)
    expected = [*tokenizer.encode("the river"), tokenizer.eod, *tokenizer.encode(" is  good ."),
                tokenizer.eod]
    assert pairs.tokens[1].tolist() == expected
    assert tokenizer.decode(expected[pairs.starts[1]:-1]) == " is  good ."
    assert pairs.truncated == 0


def test_truncation_takes_the_beginning_of_the_context_and_never_the_completion(
    tmp_path, tokenizer
):
    context, completion = "the cheap restaurant near river", "serves food"
    place = one_record(tmp_path, context, completion)
    ending = [tokenizer.eod, *tokenizer.encode(f" {completion}"), tokenizer.eod]
    whole = [*tokenizer.encode(context), *ending]
    for window in range(len(ending) - 1, len(whole) + 2):
        pairs = tokenize("jsonl", place, "train", tokenizer, window)
        assert pairs.tokens[1].tolist() == whole[-window - 1:]  # the last token is a label only
        assert pairs.targets[1] == len(ending) - 1
        assert pairs.truncated == (window < len(whole) - 1)


def test_a_completion_longer_than_the_window_is_named(tmp_path, tokenizer):
    completion = " ".join(WORDS)
    needed = len(tokenizer.encode(f" {completion}")) + 1
    with pytest.raises(ValueError) as caught:
        tokenize("jsonl", one_record(tmp_path, "the river", completion), "train", tokenizer,
                 needed - 1)
    for part in (str(tmp_path), "train", "example 2", "'the river'", f"{needed} tokens",
                 f"window of {needed - 1}"):
        assert part in str(caught.value)


def test_a_completion_longer_than_the_window_is_left_out_where_it_may_be(tmp_path, tokenizer):
    place = one_record(tmp_path, "the river", " ".join(WORDS))
    with pytest.raises(ValueError, match="or set data.too_long=leave_out"):
        tokenize("jsonl", place, "train", tokenizer, 8)
    pairs = tokenize("jsonl", place, "train", tokenizer, 8, "leave_out")
    assert (len(pairs), pairs.left_out) == (1, 1)
    whole = tokenize("jsonl", place, "train", tokenizer, 64)
    assert pairs.tokens[0].tolist() == whole.tokens[0].tolist()
    with pytest.raises(ValueError, match="none of its 2 completions fits the window of 1 tokens"):
        tokenize("jsonl", place, "train", tokenizer, 1, "leave_out")


@pytest.mark.parametrize("too_long", ["refuse", "leave_out"])
def test_a_completion_that_fills_the_window_is_trained_on(tmp_path, tokenizer, too_long):
    """Without its context, whatever becomes of one that is a token longer."""
    completion = " ".join(WORDS)
    ending = [tokenizer.eod, *tokenizer.encode(f" {completion}"), tokenizer.eod]
    place = one_record(tmp_path, "the river", completion)
    pairs = tokenize("jsonl", place, "train", tokenizer, len(ending) - 1, too_long)
    assert (len(pairs), pairs.left_out) == (2, 0)
    assert pairs.tokens[1].tolist() == ending


def test_only_the_completion_carries_loss(make_data, tokenizer):
    data = make_data()
    starts = {tuple(t): s for t,
              s in zip(map(tuple, data.train.tokens), data.train.starts, strict=True)}
    for batch in (next(data.training_batches(step)) for step in range(data.per_epoch)):
        for micro in batch:
            for row, mask in zip(rows([micro]), micro["loss_mask"][micro["loss_mask"].any(1)],
                                 strict=True):
                begin = starts[row] - 1
                assert not mask[:begin].any() and mask[begin : len(row)
                                                       - 1].all() and not mask[len(row) - 1 :].any()


def test_every_pair_comes_once_an_epoch_and_in_another_order_in_the_next(make_data):
    data, epochs = make_data(), []
    for epoch in range(2):
        steps = range(epoch * data.per_epoch, (epoch + 1) * data.per_epoch)
        epochs.append([row for step in steps for row in rows(next(data.training_batches(step)))])
    everything = sorted(tuple(t.tolist()) for t in data.train.tokens)
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_batches_of_another_epoch_are_of_other_pairs(recipe, make_data, monkeypatch):
    """Not the same ones in another order, where an epoch has several pools."""
    monkeypatch.setattr(completions, "POOL", 2)
    data = make_data()
    first, second = ({frozenset(chosen.tolist()) for chosen in data._draw_epoch(epoch)}
                     for epoch in (0, 1))
    assert len(first & second) < len(first) // 4


@pytest.mark.parametrize("tensor", [3, 5])
def test_padding_divides_among_ranks_of_any_number(recipe, task, tokenizer, tensor):
    """Under sequence parallelism each has as many tokens."""
    train = tokenize("jsonl", task, "train", tokenizer, 64)
    made = recipe(model={"max_positions": 600, "hidden": 60, "heads": tensor},
                  parallel={"tensor": tensor, "sequence": True})
    data = CompletionData(made, train, train, pad=0, replica=0)
    for micro in next(data.training_batches(0)):
        assert micro["tokens"].shape[1] % (8 * tensor) == 0


def test_lengths_of_batches_come_in_no_order(make_data):
    """Sorted by length, short to long or long to short, the rank correlation is 1 or -1; at random
    its standard deviation over an epoch of 20 batches is 0.23."""
    data = make_data()
    lengths = [max(micro["tokens"].shape[1] for micro in batch)
               for batch in data.training_batches(0)]
    epochs = [lengths[start : start + data.per_epoch]
              for start in range(0, len(lengths), data.per_epoch)]
    correlations = [spearmanr(range(len(epoch)), epoch).statistic for epoch in epochs]
    assert max(map(abs, correlations)) < 0.8 and abs(np.mean(correlations)) < 0.35
    assert len(set(map(tuple, epochs))) == len(epochs) == 5


def test_the_run_ends_after_its_epochs(make_data):
    assert len(list(make_data().training_batches(0))) == 5 * make_data().per_epoch


def test_order_depends_on_the_seed_alone(make_data):
    assert rows(next(make_data().training_batches(3))) == rows(
        next(make_data().training_batches(3))
    )
    assert rows(next(make_data().training_batches(3))) != rows(
        next(make_data(seed=2).training_batches(3))
    )


def test_going_on_at_a_step_gives_what_a_straight_run_gives(make_data):
    straight = list(make_data().training_batches(0))
    for first in (1, 20, 21, 57):
        for batch, there in zip(make_data().training_batches(first), straight[first:], strict=True):
            assert all(torch.equal(m[k], t[k]) for m,
                       t in zip(batch, there, strict=True) for k in m)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_global_batch_is_the_same_at_every_layout(make_data, layout, micro_batch):
    for step in (0, 11, 19, 20, 30):
        assert global_batch(make_data, step, micro_batch=micro_batch,
                            **layout) == global_batch(make_data, step, data=1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_micro_batch_losses_average_to_the_mean_over_the_tokens(make_data, layout):
    replicas, draw = layout["data"], torch.Generator().manual_seed(0)

    def averaged(batches_by_replica):
        losses, counted, total = [], 0.0, 0.0
        for share in batches_by_replica:
            for micro in share:
                each = torch.rand(micro["loss_mask"].shape, generator=draw)
                losses.append((each * micro["loss_mask"]).sum() / micro["loss_tokens"])
                total += float((each * micro["loss_mask"]).sum())
                counted += float(micro["loss_mask"].sum())
        return float(torch.stack(losses).mean()), total, counted

    data = [make_data(replica, **layout) for replica in range(replicas)]
    for step in (0, 7, 19):
        mean, total, counted = averaged([next(d.training_batches(step)) for d in data])
        assert mean == pytest.approx(total / counted)
    outcomes = [averaged(shares)
                for shares in zip(*(d.validation_batches() for d in data), strict=True)]
    counted = sum(count for _, _, count in outcomes)
    assert len(outcomes) == data[0].valid_batches == 3  # the last one is short
    assert counted == data[0].valid.targets.sum()
    assert np.mean([mean for mean, _, _ in outcomes]) == pytest.approx(sum(t for _, t,
                                                                           _ in outcomes) / counted)


def test_batches_are_padded_to_their_longest_and_of_like_length(make_data):
    data, padded, read = make_data(tensor=4, sequence=True), 0, 0
    for batch in (next(data.training_batches(step)) for step in range(data.per_epoch)):
        for micro in batch:
            longest = max((len(row) - 1 for row in rows([micro])), default=1)
            assert micro["tokens"].shape == micro["labels"].shape == micro["loss_mask"].shape
            assert micro["tokens"].shape == (2, -(-longest // 8) * 8)
            padded, read = padded + micro["tokens"].numel(), read + sum(len(row) - 1
                                                                        for row in rows([micro]))
    alone = -(-data.train.lengths // 8) * 8  # of every pair without a neighbor
    assert padded < 1.1 * alone.sum() < 2 * np.maximum(alone[:-1:2], alone[1::2]).sum()
    assert read == data.train.lengths.sum()


def test_no_row_is_longer_than_the_window(recipe, task, tokenizer):
    train = tokenize("jsonl", task, "train", tokenizer, 60)
    made = recipe(model={"max_positions": 60}, parallel={"tensor": 2, "sequence": True},
                  train={"micro_batch": 8})
    data = CompletionData(made, train, train, pad=0, replica=0)
    assert train.truncated and max(train.lengths) == 60
    widths = {micro["tokens"].shape[1] for batch in data.validation_batches() for micro in batch}
    assert max(widths) == 60


def test_consumed_counts_the_tokens_that_were_read(make_data):
    data, read = make_data(), 0
    assert data.consumed(0) == 0
    for step in range(2 * data.per_epoch + 3):
        read += sum(len(row) - 1 for row in rows(next(data.training_batches(step))))
        assert data.consumed(step + 1) == read


class CountingList(list):
    """A list that counts how often all of it was gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_a_step_does_not_go_through_all_pairs(make_data):
    """For batches, counts of tokens and targets; an epoch of steps would be quadratic in pairs."""
    data = make_data()
    tokens = data.train.tokens
    counted = dataclasses.replace(data.train, tokens=CountingList(tokens))
    data = CompletionData(data.recipe, counted, data.valid, pad=0, replica=0)
    for _, step in zip(data.training_batches(0), range(1, data.per_epoch + 3), strict=False):
        data.consumed(step)
        data.consumed(step - 1)
    assert counted.tokens.passes <= 1
