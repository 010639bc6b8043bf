"""Checks the data of a run before a device is touched: whole files, one tokenizer, the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_spdf.data.indexed.manifest import check_prefix, is_foreign
from megatron_spdf.data.indexed.tokens import look_at_ids
from megatron_spdf.data.pretraining.blend import BlendHistory
from megatron_spdf.data.pretraining.shared_memory import require_shared_memory
from megatron_spdf.data.pretraining.sources import Source, expand, make_source, training_sources
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.recipe.recipe import Recipe

MOST_PADDING = 4096  # rows of a published vocabulary without an id; a small one may be doubled


@dataclass(frozen=True)
class Corpus:
    """Checked data of a run: tokenizer, training sources and validation sources."""

    tokenizer: Tokenizer
    train: list[Source]
    valid: list[Source]

    @property
    def contents(self) -> dict[str, str]:
        """Keys of the recipe that name data -> hash of the tokens that lie there."""
        train = _hash(sorted((s.content, round(s.weight, 9)) for s in self.train))
        return {"data.train": train, "data.blend": train,
                "data.valid": _hash([s.content for s in self.valid])}


def check_corpus(recipe: Recipe) -> Corpus:
    """Checks every data set of a recipe against its manifest, its tokenizer, the model and the run
    so far; of one that another tool made, the ids.

    Raises:
        ValueError: a data set is damaged, too small or of another tokenizer, or the blend is not
            the run's, or shared memory is too small for the loader processes.
        FileNotFoundError: a tokenizer is missing.
    """
    entries = expand(recipe.data)
    tokenizer = data_tokenizer(recipe)
    train = training_sources(entries, tokenizer.sha256)
    valid = [make_source(prefix, check_prefix(prefix, tokenizer.sha256))
             for prefix in recipe.data.valid]
    _check_sizes(recipe, train, valid)
    for source in train + valid:
        if is_foreign(source.prefix):
            look_at_ids(source.prefix, tokenizer.vocab_size)
    require_shared_memory(recipe)
    if recipe.data.on_blend_change == "refuse":
        BlendHistory(Path(recipe.output), train).require_unchanged()
    return Corpus(tokenizer, train, valid)


def data_tokenizer(recipe: Recipe) -> Tokenizer:
    """Loads the tokenizer of a recipe's data. The model must have a row for each of its ids, and
    may have some that pad the vocabulary.

    Raises:
        ValueError: a data set is not whole, or the vocabularies differ by more than padding.
        FileNotFoundError: the tokenizer is missing.
    """
    first = expand(recipe.data)[0].prefix
    check_prefix(first)  # a wrong prefix is reported as such, not as a missing tokenizer
    tokenizer = load_tokenizer(recipe.data.tokenizer or f"{first}.tokenizer",
                               recipe.data.end_of_document)
    rows, ids = recipe.model.vocab_size, tokenizer.vocab_size
    if not ids <= rows <= ids + max(ids, MOST_PADDING):
        raise ValueError(f"model.vocab_size={rows}, but the data's tokenizer knows {ids} tokens; "
                         f"set model.vocab_size={ids}, or somewhat more to pad it. A model that "
                         "is given with more rows has another tokenizer: use data of that one")
    return tokenizer


def _hash(what: list) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _check_sizes(recipe: Recipe, train: list[Source], valid: list[Source]) -> None:
    length = recipe.train.sequence_length
    for source in train + valid:
        if source.tokens <= length:
            raise ValueError(f"{source.prefix} holds {source.tokens:,} tokens, which is not one "
                             f"sequence of train.sequence_length={length} and its label; use more "
                             "text or a shorter sequence")
    windows = sum((source.tokens - 1) // length for source in valid)
    if valid and windows < recipe.train.global_batch:
        raise ValueError(f"the validation data hold {windows} sequences of {length} tokens, fewer "
                         f"than one batch of train.global_batch={recipe.train.global_batch}; use "
                         "more text or a smaller batch")
