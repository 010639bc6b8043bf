"""Token sequences of fixed length: training samples from shuffled documents, and validation windows
in the order of the text.

Both are T + 1 tokens, inputs and labels shifted by one, and treat document boundaries alike.

Shapes: T tokens of a sequence (`train.sequence_length`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from megatron_spdf.data.indexed.tokens import IndexedTokens
from megatron_spdf.data.pretraining.index_cache import built_once
from megatron_spdf.data.pretraining.sources import Source
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.files import new_file
from megatron_spdf.recipe.recipe import Recipe

_LEAST_SAMPLES = 1 << 16  # of an index, so that a small source does not need thousands of them
_INDICES = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True)
class DocumentBoundaries:
    """Rule for a document boundary inside a sequence. A document includes its end-of-document
    token.

    Attributes:
        eod: the end-of-document token.
        reset_positions: count positions from 0 in every document.
        reset_attention: let tokens attend to their own document only.
    """

    eod: int
    reset_positions: bool = False
    reset_attention: bool = False

    def sample(self, text: np.ndarray) -> dict[str, Tensor]:
        """Makes inputs, labels, loss mask and positions, (T,) each, from T + 1 tokens.

        With `reset_attention` also "documents", (T,), the number of each token's document, counted
        from 0.
        """
        text = torch.from_numpy(text.astype(np.int64))
        tokens, labels = text[:-1].contiguous(), text[1:].contiguous()
        positions = torch.arange(len(tokens))
        starts = torch.zeros_like(tokens)
        # the first token of a sequence may continue a document: it starts none
        starts[1:] = tokens[:-1] == self.eod
        if self.reset_positions:
            # each position minus that of the last start before it
            positions = positions - torch.cummax(positions * starts, 0).values
        sample = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(len(tokens)),
                  "position_ids": positions}
        if self.reset_attention:
            sample["documents"] = torch.cumsum(starts, 0)
        return sample


def samples_in(tokens: int, length: int) -> int:
    """Counts the sequences of `length` tokens and one more label that fit one after another into
    `tokens`."""
    return max(0, (tokens - 1) // length)


def epochs_per_index(source: Source, recipe: Recipe) -> int:
    """Number of epochs that share an index: one, or several of a source so small that it would need
    many indices."""
    return max(1, _LEAST_SAMPLES // samples_in(source.tokens, recipe.train.sequence_length))


def samples_per_index(source: Source, recipe: Recipe) -> int:
    """Number of samples in the epochs that share an index."""
    tokens = source.tokens * epochs_per_index(source, recipe)
    return samples_in(tokens, recipe.train.sequence_length)


class ShuffledEpochs(GPTDataset):
    """Several epochs over a source: documents in random order in each, cut into sequences, which
    are shuffled again.

    A Megatron-Core dataset with an index of ours. The order depends on the seed, the content of the
    source and the number of the index alone: neither the samples that a run asks for nor the paths
    of the files change it. Any process builds the index, once (`index_cache.built_once`), while
    Megatron-Core's rank 0 builds it into files that others may read too soon, or miss on their own
    disk.

    Args:
        source: of the tokens.
        number: of the index over `source`, counted from 0; each holds `epochs_per_index` epochs.
        recipe: gives seed, sequence length and document boundaries.
        tokenizer: gives the end-of-document token.
        cache: directory for the index.
    """

    def __init__(self, source: Source, number: int, recipe: Recipe, tokenizer: Tokenizer,
                 cache: Path):
        """Opens the source, and builds the index if the cache has none."""
        self._length, self._epochs = recipe.train.sequence_length, epochs_per_index(source, recipe)
        self._tokens, self._cache = source.tokens, cache
        self._boundaries = boundaries_of(recipe, tokenizer)
        order = f"{recipe.seed} {source.content} {number}"
        content = hashlib.sha256(f"{order} {self._length} {self._epochs}".encode())
        self._key = f"epochs-{content.hexdigest()[:32]}"
        config = GPTDatasetConfig(
            # not Python's hash, which differs from process to process
            random_seed=int.from_bytes(hashlib.sha256(order.encode()).digest()[:4], "big"),
            sequence_length=self._length, blend=([source.content], None), split="1,0,0",
            tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, create_attention_mask=False)
        nothing = np.empty(0, np.int32)  # the choice of documents; our index holds all of them
        super().__init__(IndexedTokens(source.prefix, tokenizer.vocab_size), source.content,
                         nothing, None, Split.train, config)
        assert len(self) == samples_per_index(source, recipe)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Sample `number` of the shuffled order, as `DocumentBoundaries.sample` makes it."""
        text, *_ = self._query_document_sample_shuffle_indices(number)
        return self._boundaries.sample(text)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        place = built_once(self._cache, self._key, self._build)
        return tuple(np.load(place / f"{name}.npy", mmap_mode="r") for name in _INDICES)

    def _build(self, directory: Path) -> None:
        """Writes the index. That of a single epoch equals Megatron-Core's for this seed."""
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
        # A sequence belongs to the epoch in which it starts, and is shuffled within that.
        first = [-(-epoch * self._tokens // self._length) for epoch in range(self._epochs)]
        for start, end in zip(first, [*first[1:], count], strict=True):
            draw.shuffle(order[start:end])
        for name, index in zip(_INDICES, (documents.reshape(-1), samples, order), strict=True):
            with new_file(directory / f"{name}.npy") as file:
                np.save(file, index)


class Windows(Dataset):
    """Validation sequences: fixed, without overlap, the same for every seed.

    Window w of a source is tokens [w T, w T + T] in the order of the text, the last one a label
    only. Of the windows of all sources in turn, `count` are taken at even distances.

    Attributes:
        read_from: the data sets.
    """

    def __init__(self, sources: list[Source], count: int, recipe: Recipe, tokenizer: Tokenizer):
        self._length, self._tokenizer = recipe.train.sequence_length, tokenizer
        self._boundaries = boundaries_of(recipe, tokenizer)
        self.read_from = [IndexedTokens(s.prefix, tokenizer.vocab_size) for s in sources]
        self._ends = np.cumsum([samples_in(s.tokens, self._length) for s in sources])
        self._chosen = np.arange(count) * int(self._ends[-1]) // max(count, 1)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self._boundaries.sample(self._text(number))

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that the labels of all windows stand for."""
        return sum(self._tokenizer.text_bytes(self._text(number)[1:].tolist())
                   for number in range(len(self)))

    def _text(self, number: int) -> np.ndarray:
        window = self._chosen[number]
        # a window that equals the end of a source is the first of the next
        source = int(np.searchsorted(self._ends, window, side="right"))
        start = int(window - (self._ends[source - 1] if source else 0)) * self._length
        return self.read_from[source].read(start, self._length + 1)


def boundaries_of(recipe: Recipe, tokenizer: Tokenizer) -> DocumentBoundaries:
    """Document boundaries as a recipe treats them."""
    data = recipe.data
    return DocumentBoundaries(tokenizer.eod, data.reset_positions, data.reset_attention)
