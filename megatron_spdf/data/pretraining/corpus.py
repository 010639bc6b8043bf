"""What training asks of its data before it touches a device: whole files, one tokenizer, a fitting
vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_spdf.data.indexed.manifest import check_prefix
from megatron_spdf.data.pretraining.blend import BlendHistory
from megatron_spdf.data.pretraining.sources import Source, expand, make_source, training_sources
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.recipe.recipe import Recipe


@dataclass(frozen=True)
class Corpus:
    """The checked data of a run: its tokenizer, its training and its validation data sets."""

    tokenizer: Tokenizer
    train: list[Source]
    valid: list[Source]


def check_corpus(recipe: Recipe) -> Corpus:
    """Checks every data set of a recipe against its manifest, its tokenizer, the model, and the run
    it goes on with.

    Raises:
        ValueError, FileNotFoundError: with the value, the rule and the remedy.
    """
    entries = expand(recipe.data)
    tokenizer = data_tokenizer(recipe)
    train = training_sources(entries, tokenizer.sha256)
    valid = [make_source(prefix, check_prefix(prefix, tokenizer.sha256))
             for prefix in recipe.data.valid]
    _check_sizes(recipe, train, valid)
    if recipe.data.on_blend_change == "refuse":
        BlendHistory(Path(recipe.output), train).require_unchanged()
    return Corpus(tokenizer, train, valid)


def data_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of a recipe's data, which must know as many tokens as the model.

    Raises:
        ValueError, FileNotFoundError: with the value, the rule and the remedy.
    """
    first = expand(recipe.data)[0].prefix
    check_prefix(first)  # a prefix that is not there says so, and not that its tokenizer is not
    tokenizer = load_tokenizer(recipe.data.tokenizer or f"{first}.tokenizer")
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise ValueError(f"model.vocab_size={recipe.model.vocab_size}, but the data's tokenizer "
                         f"knows {tokenizer.vocab_size} tokens; set "
                         f"model.vocab_size={tokenizer.vocab_size}")
    return tokenizer


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
