"""What training asks of its data before it touches a device: whole files, one tokenizer, a fitting vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_spdf.config import Recipe
from megatron_spdf.data.manifest import check_prefix
from megatron_spdf.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Corpus:
    """The checked data of a run: its tokenizer, and the tokens of every training and validation prefix."""

    tokenizer: Tokenizer
    train_tokens: list[int]
    valid_tokens: list[int]


def check_corpus(recipe: Recipe) -> Corpus:
    """Checks every prefix of a recipe against its manifest, its tokenizer and the model.

    Raises:
        ValueError, FileNotFoundError: with the value, the rule and the remedy.
    """
    data, tokenizer = recipe.data, data_tokenizer(recipe)
    train = [check_prefix(p, tokenizer.sha256).tokens for p in data.train]
    valid = [check_prefix(p, tokenizer.sha256).tokens for p in data.valid]
    length = recipe.train.sequence_length
    for prefix, tokens in zip(data.train + data.valid, train + valid, strict=True):
        if tokens <= length:
            raise ValueError(f"{prefix} holds {tokens:,} tokens, which is not one sequence of "
                             f"train.sequence_length={length} and its label; use more text or a shorter sequence")
    windows = sum((t - 1) // length for t in valid)
    if valid and windows < recipe.train.global_batch:
        raise ValueError(f"the validation data hold {windows} sequences of {length} tokens, fewer than one batch of "
                         f"train.global_batch={recipe.train.global_batch}; use more text or a smaller batch")
    return Corpus(tokenizer, train, valid)


def data_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of a recipe's data, which must know as many tokens as the model.

    Raises:
        ValueError, FileNotFoundError: with the value, the rule and the remedy.
    """
    data = recipe.data
    if not data.train:
        raise ValueError("data.train is empty; name at least one prefix made by tools/preprocess_data.py")
    check_prefix(data.train[0])  # a prefix that is not there says so, and not that its tokenizer is not
    tokenizer = load_tokenizer(data.tokenizer or f"{data.train[0]}.tokenizer")
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise ValueError(f"model.vocab_size={recipe.model.vocab_size}, but the data's tokenizer knows "
                         f"{tokenizer.vocab_size} tokens; set model.vocab_size={tokenizer.vocab_size}")
    return tokenizer
