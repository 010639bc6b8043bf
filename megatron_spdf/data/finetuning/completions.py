"""Contexts and completions as tokens, and their batches: the same at every layout, with little
padding.

An example is context + EOD + " " + completion + EOD (Hu et al. 2022, the NLG example of LoRA). The
loss is on the tokens after the first EOD, mean over the completion tokens of the global batch.

Shapes: N pairs of a split, G of a global batch, B rows of a micro-batch, T tokens of its longest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.random import Philox

from megatron_spdf.data.finetuning.task import (
    TASKS,
    Example,
    load_examples,
    shortened,
    training_pairs,
)
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.random_streams import stream_key
from megatron_spdf.recipe.recipe import Recipe

STREAM = "megatron_spdf fine-tuning order stream 1"
TooLong = Literal["refuse", "leave_out"]
POOL = 64  # global batches that are sorted by length together
PAD_MULTIPLE = 8  # tokens; tensor cores want it


@dataclass(frozen=True)
class Completions:
    """Tokenized pairs of a split.

    Attributes:
        tokens: N arrays int32, context + EOD + completion + EOD of each pair, at most one token
            longer than the context window.
        starts: (N,), index of each completion's first token.
        truncated: number of pairs whose context was cut.
        left_out: number of pairs whose completion alone does not fit.
    """

    tokens: list[np.ndarray]
    starts: np.ndarray
    truncated: int
    left_out: int = 0

    @cached_property  # some milliseconds for E2E's 42,061 pairs, and every step asks
    def lengths(self) -> np.ndarray:
        """Tokens of each pair that the model reads, (N,): all but the last, which is a label
        only."""
        return np.array([len(t) - 1 for t in self.tokens])

    @cached_property
    def targets(self) -> np.ndarray:
        """Completion tokens of each pair, (N,), EOD included."""
        return self.lengths + 1 - self.starts

    @property
    def sha256(self) -> str:
        """Hash of the tokens and of where completions begin."""
        digest = hashlib.sha256(self.starts.tobytes())
        for tokens in self.tokens:
            digest.update(tokens)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)


def tokenize(task: str, path: Path, split: str, tokenizer: Tokenizer, window: int,
             too_long: TooLong = "refuse") -> Completions:
    """Reads a split and tokenizes its pairs.

    A pair that is too long loses an end of its context, the one that the task says, and never any
    of its completion.

    Args:
        task: name of the task that reads the file.
        path: file of examples, or directory of splits.
        split: train, valid or test.
        tokenizer: of the model.
        window: longest sequence that the model reads, in tokens.
        too_long: what becomes of a pair whose completion alone does not fit.

    Raises:
        ValueError: the data are malformed, a completion alone does not fit and is not left out, or
            nothing is left; names file and record.
        FileNotFoundError: the split is not there.
    """
    tokens, starts, truncated, left_out = [], [], 0, 0
    loses = TASKS.get(task).loses
    for number, example in enumerate(load_examples(task, path, split), 1):
        context = tokenizer.encode(example.context)
        for _, completion in training_pairs([example]):
            ending = _ending(completion, tokenizer)
            room = window + 1 - len(ending)
            if room < 0 and too_long == "leave_out":
                left_out += 1
                continue
            if room < 0:
                raise ValueError(_too_long(path, split, number, example, len(ending) - 1, window))
            kept = shortened(context, room, loses)
            truncated += len(kept) < len(context)
            tokens.append(np.array(kept + ending, dtype=np.int32))
            starts.append(len(kept) + 1)
    if not tokens:
        raise ValueError(_none_fits(path, split, left_out, window))
    return Completions(tokens, np.array(starts), truncated, left_out)


def require_fit(task: str, path: Path, split: str, tokenizer: Tokenizer, window: int,
                too_long: TooLong = "refuse") -> None:
    """Raises the ValueError of `tokenize` for completions that alone do not fit; contexts are not
    looked at."""
    lengths = _completion_lengths(task, path, split, tokenizer)
    over = [pair for pair in lengths if pair[1] > window]
    if over and too_long == "refuse":
        number, length = over[0]
        example = load_examples(task, path, split)[number - 1]
        raise ValueError(_too_long(path, split, number, example, length, window))
    if len(over) == len(lengths):
        raise ValueError(_none_fits(path, split, len(over), window))


@lru_cache(maxsize=8)  # for many runs of the same data
def _completion_lengths(task: str, path: Path, split: str,
                        tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Number of the example, and tokens that the model has to read, of every completion."""
    return [(number, len(_ending(completion, tokenizer)) - 1)
            for number, example in enumerate(load_examples(task, path, split), 1)
            for _, completion in training_pairs([example])]


def _ending(completion: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a pair behind its context."""
    return [tokenizer.eod, *tokenizer.encode(f" {completion}"), tokenizer.eod]


def _none_fits(path: Path, split: str, count: int, window: int) -> str:
    return (f"{path}, {split} split: none of its {count:,} completions fits the window of {window} "
            "tokens; raise train.sequence_length")


def _too_long(path: Path, split: str, number: int, example: Example, length: int,
              window: int) -> str:
    return (f"{path}, {split} split, example {number} ({example.context[:60]!r}): a completion of "
            f"{length} tokens, its end-of-document token included, does not fit the window of "
            f"{window}; raise train.sequence_length up to the model's max_positions, or remove the "
            "example, or set data.too_long=leave_out")


class CompletionData:
    """Batches of a fine-tuning run on this rank, with the interface of `TokenData`.

    Args:
        recipe: of the training run.
        train, valid: tokenized splits; the loss on all of `valid` is the validation loss.
        pad: any token; its places carry no loss.
        replica: data-parallel rank.
    """

    def __init__(self, recipe: Recipe, train: Completions, valid: Completions, pad: int,
                 replica: int):
        self.recipe, self.train, self.valid = recipe, train, valid
        self.pad, self.replica = pad, replica
        self.per_epoch = math.ceil(len(train) / recipe.train.global_batch)
        self.valid_batches = math.ceil(len(valid) / recipe.train.global_batch)
        self.mean_length = math.ceil(train.lengths.mean())
        self.valid_tokens_per_byte = None  # bits per byte are a measure of text, not of completions
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._tokens_read = lru_cache(maxsize=2)(self._count_epoch)

    def training_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        """Yields this rank's micro-batches of every step from `first_step`, counted from 0, to the
        end of the run."""
        for step in range(first_step, self.recipe.steps):
            epoch, number = divmod(step, self.per_epoch)
            chosen = self._epoch(epoch)[number]
            yield self._micro_batches(self.train, chosen, self.train.targets[chosen].sum())

    def validation_batches(self) -> Iterator[list[MicroBatch]]:
        """Yields all validation pairs, in the same batches every time.

        The mean of the batches' losses is the mean over all completion tokens.
        """
        order, size = np.argsort(self.valid.lengths, kind="stable"), self.recipe.train.global_batch
        for start in range(0, len(order), size):
            yield self._micro_batches(self.valid, order[start : start + size],
                                      self.valid.targets.sum() / self.valid_batches)

    def consumed(self, steps: int) -> int:
        """Number of tokens, without padding, that the model has read after `steps` steps."""
        epochs, rest = divmod(steps, self.per_epoch)
        read = self._tokens_read(epochs)[rest - 1] if rest else 0
        return int(epochs * self.train.lengths.sum() + read)

    def consumed_by_source(self, steps: int) -> dict[str, int]:
        """Returns nothing, since a fine-tuning run has one source."""
        return {}

    def _draw_epoch(self, epoch: int) -> list[np.ndarray]:
        """Draws the global batches of an epoch, as indices into `train`, from the seed and the
        epoch alone.

        A random order is cut into pools, each pool is sorted by length and cut into batches, and
        the batches are put into a random order again.
        """
        size = self.recipe.train.global_batch
        order = _random_order(self.recipe.seed, epoch, "examples", len(self.train))
        lengths, batches = self.train.lengths, []
        for start in range(0, len(order), POOL * size):
            pool = order[start : start + POOL * size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        return [batches[i] for i in _random_order(self.recipe.seed, epoch, "batches", len(batches))]

    def _count_epoch(self, epoch: int) -> np.ndarray:
        """Tokens that the model has read after each step of an epoch, (steps,), without padding."""
        lengths = self.train.lengths
        return np.cumsum([lengths[chosen].sum() for chosen in self._epoch(epoch)])

    def _micro_batches(self, pairs: Completions, chosen: np.ndarray,
                       targets: float) -> list[MicroBatch]:
        """Takes this rank's share of a global batch, neighbors in length together. Empty rows fill
        a short batch.

        Args:
            pairs: tokenized split.
            chosen: (at most G,), indices into `pairs` of the global batch.
            targets: completion tokens by which the loss of the global batch is divided.
        """
        train, replicas = self.recipe.train, self.recipe.parallel.data
        size = train.micro_batch
        loss_tokens = torch.tensor(targets / (train.global_batch // size), dtype=torch.float32)
        batch = []
        for micro in range(self.recipe.micro_batches):
            start = (micro * replicas + self.replica) * size
            batch.append(self._padded(pairs, chosen[start : start + size])
                         | {"loss_tokens": loss_tokens})
        return batch

    def _padded(self, pairs: Completions, rows: np.ndarray) -> MicroBatch:
        """Pads rows on the right to the longest of them: tokens, labels, loss mask and positions,
        (B, T)."""
        train = self.recipe.train
        multiple = math.lcm(PAD_MULTIPLE, self.recipe.parallel.tensor)
        longest = max((len(pairs.tokens[row]) - 1 for row in rows), default=1)
        length = min(-(-longest // multiple) * multiple, train.sequence_length)
        text = np.full((train.micro_batch, length + 1), self.pad, dtype=np.int64)
        mask = np.zeros((train.micro_batch, length), dtype=np.float32)
        for place, row in enumerate(rows):
            tokens = pairs.tokens[row]
            text[place, : len(tokens)] = tokens
            mask[place, pairs.starts[row] - 1 : len(tokens) - 1] = 1.0
        position = torch.arange(length).expand(train.micro_batch, -1).contiguous()
        return {"tokens": torch.from_numpy(text[:, :-1].copy()),
                "labels": torch.from_numpy(text[:, 1:].copy()),
                "loss_mask": torch.from_numpy(mask), "position_ids": position}


def _random_order(seed: int, epoch: int, what: str, count: int) -> np.ndarray:
    """Draws a permutation of range(count) from a counter-based stream."""
    return np.argsort(Philox(key=stream_key(STREAM, seed, epoch, what)).random_raw(count),
                      kind="stable")
