"""Token sequences of fixed length: training samples from shuffled documents, validation windows
from the text's order.

Both are T + 1 tokens, inputs and labels shifted by one, and share document boundaries that options
ask for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from megatron_spdf.data.indexed.index_file import read_index_header
from megatron_spdf.data.indexed.manifest import file_of
from megatron_spdf.data.pretraining.index_cache import built_once
from megatron_spdf.data.pretraining.sources import Source
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.recipe.recipe import Recipe

_LEAST_SAMPLES = 1 << 16
_INDICES = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True)
class Borders:
    """What happens at the end of a document inside a sequence; the end-of-document token belongs to
    the document.

    Attributes:
        eod: the end-of-document token.
        reset_positions: positions start at 0 with every document.
        reset_attention: tokens attend to their own document only.
    """

    eod: int
    reset_positions: bool = False
    reset_attention: bool = False

    def sample(self, text: np.ndarray) -> dict[str, Tensor]:
        """Inputs, labels, loss mask and positions, (T,) each, of T + 1 tokens.

        With `reset_attention` also "documents", (T,), the number of the document a token is in,
        counted from 0.
        """
        text = torch.from_numpy(text.astype(np.int64))
        tokens, labels = text[:-1].contiguous(), text[1:].contiguous()
        positions = torch.arange(len(tokens))
        starts = torch.zeros_like(tokens)
        starts[1:] = tokens[:-1] == self.eod
        if self.reset_positions:
            positions = positions - torch.cummax(positions * starts, 0).values
        sample = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(len(tokens)),
                  "position_ids": positions}
        if self.reset_attention:
            sample["documents"] = torch.cumsum(starts, 0)
        return sample


def samples_in(tokens: int, length: int) -> int:
    """Sequences of `length` tokens and a label more that fit one after the other into `tokens`."""
    return max(0, (tokens - 1) // length)


def epochs_in_pass(source: Source, recipe: Recipe) -> int:
    """Epochs that share an index: one of a source of any size, several of one that would need many
    indices."""
    return max(1, _LEAST_SAMPLES // samples_in(source.tokens, recipe.train.sequence_length))


def samples_in_pass(source: Source, recipe: Recipe) -> int:
    return samples_in(source.tokens * epochs_in_pass(source, recipe), recipe.train.sequence_length)


class Pass(GPTDataset):
    """A number of epochs over a source: documents in random order in each, cut into sequences, in
    random order again.

    Megatron-Core's dataset with an index of our own: the order depends on the seed, the content of
    the source and the number of the pass, and neither on how many samples a run will ask for nor on
    where the files lie; and the index is built once (`cache.built_once`) by any process, where
    Megatron-Core's is built by rank 0 into files that others may read too soon, or not find on
    their own disk.
    """

    def __init__(self, source: Source, number: int, recipe: Recipe, tokenizer: Tokenizer,
                 cache: Path):
        """The pass `number`, from 0, over `source`."""
        self._length, self._epochs = recipe.train.sequence_length, epochs_in_pass(source, recipe)
        self._tokens, self._cache, self._borders = (
            source.tokens,
            cache,
            borders_of(recipe, tokenizer),
        )
        order = f"{recipe.seed} {source.content} {number}"
        self._key = (
            "pass-"
            + hashlib.sha256(f"{order} {self._length} {self._epochs}".encode()).hexdigest()[:32]
        )
        config = GPTDatasetConfig(
            random_seed=int.from_bytes(hashlib.sha256(order.encode()).digest()[:4], "big"),
            sequence_length=self._length, blend=([source.content], None), split="1,0,0",
            tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, create_attention_mask=False)
        nothing = np.empty(0, np.int32)  # all documents, which the index tells
        super().__init__(IndexedDataset(source.prefix), source.content, nothing, None, Split.train,
                         config)
        assert len(self) == samples_in_pass(source, recipe)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        text, *_ = self._query_document_sample_shuffle_indices(number)
        return self._borders.sample(text)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        place = built_once(self._cache, self._key, self._build)
        return tuple(np.load(place / f"{name}.npy", mmap_mode="r") for name in _INDICES)

    def _build(self, directory: Path) -> None:
        """For a single epoch, the index that Megatron-Core builds of this seed."""
        from megatron.core.datasets import helpers

        draw = np.random.RandomState(self.config.random_seed)
        documents = np.tile(np.arange(len(self.dataset), dtype=np.int32), (self._epochs, 1))
        for epoch in documents:
            draw.shuffle(epoch)
        samples = helpers.build_sample_idx(
            np.array(self.dataset.sequence_lengths), documents.reshape(-1), self._length,
            self._epochs, self._tokens, True, 1)
        count = len(samples) - 1
        order = np.arange(count, dtype=np.uint32 if count < 2**32 else np.int64)
        # A sequence is of the epoch that it starts in.
        first = [-(-epoch * self._tokens // self._length) for epoch in range(self._epochs)]
        for start, end in zip(first, [*first[1:], count], strict=True):
            draw.shuffle(order[start:end])
        for name, index in zip(_INDICES, (documents.reshape(-1), samples, order), strict=True):
            np.save(directory / f"{name}.npy", index)


class Windows(Dataset):
    """Validation sequences: fixed, without overlap, the same whatever the seed.

    Window w of a source is tokens [w T, w T + T] in the order of the text, the last one a label
    only. Of the windows of all sources in turn, `count` are taken at even distances.

    Attributes:
        text_bytes: UTF-8 bytes of the text that the labels of all windows stand for.
    """

    def __init__(self, sources: list[Source], count: int, recipe: Recipe, tokenizer: Tokenizer):
        self._length, self._tokenizer = recipe.train.sequence_length, tokenizer
        self._borders = borders_of(recipe, tokenizer)
        self._tokens = [_all_tokens(source.prefix) for source in sources]
        self._ends = np.cumsum([samples_in(s.tokens, self._length) for s in sources])
        self._chosen = np.arange(count) * int(self._ends[-1]) // max(count, 1)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self._borders.sample(self._text(number))

    @property
    def text_bytes(self) -> int:
        return sum(self._tokenizer.text_bytes(self._text(number)[1:].tolist())
                   for number in range(len(self)))

    def _text(self, number: int) -> np.ndarray:
        window = self._chosen[number]
        source = int(np.searchsorted(self._ends, window, side="right"))
        start = int(window - (self._ends[source - 1] if source else 0)) * self._length
        return self._tokens[source][start : start + self._length + 1]


def _all_tokens(prefix: str) -> np.ndarray:
    """(tokens,) of a data set, memory-mapped."""
    return np.memmap(file_of(prefix, "bin"), read_index_header(file_of(prefix, "idx")).dtype, "r")


def borders_of(recipe: Recipe, tokenizer: Tokenizer) -> Borders:
    return Borders(tokenizer.eod, recipe.data.reset_positions, recipe.data.reset_attention)
