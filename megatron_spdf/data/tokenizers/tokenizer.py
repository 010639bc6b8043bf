"""Load a tokenizer from its files, or train a new one."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_spdf.data.tokenizers.kinds import (
    END_OF_TEXT,
    Gpt2Bpe,
    HuggingFace,
    SentencePiece,
    Tokenizer,
    is_plain_byte_level,
    well_formed,
)

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]

_ACCEPTED = (
    "GPT-2 BPE files (encoder.json or vocab.json, with vocab.bpe or merges.txt), "
    "a Hugging Face tokenizer.json, or one SentencePiece *.model"
)
# SentencePiece drops training sentences longer than its limit in bytes; a character has at most 4.
_SENTENCE_CHARACTERS = 2048
_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer whose files lie in the directory `path`, or whose one file `path` is.

    A directory with tokenizer.json and BPE files, as published with GPT-2 and its kin, is read from
    the BPE files when tokenizer.json describes plain byte-level BPE, and from tokenizer.json
    otherwise.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: `path` holds no tokenizer, more than one, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}; accepted: {_ACCEPTED}")
    kind, files = _find_in_directory(path) if path.is_dir() else _find_file(path)
    try:
        return kind(*(file.read_bytes() for file in files))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _find_file(path: Path) -> tuple[type[Tokenizer], list[Path]]:
    kinds = {".json": HuggingFace, ".model": SentencePiece}
    if path.suffix not in kinds:
        raise ValueError(f"{path} is not a tokenizer; accepted: a directory or file with "
                         f"{_ACCEPTED}")
    return kinds[path.suffix], [path]


def _find_in_directory(path: Path) -> tuple[type[Tokenizer], list[Path]]:
    names = {file.name for file in path.iterdir()}
    vocab = [path / name for name in ("encoder.json", "vocab.json") if name in names]
    merges = [path / name for name in ("vocab.bpe", "merges.txt") if name in names]
    found: list[tuple[type[Tokenizer], list[Path]]] = []
    if vocab and merges:
        found.append((Gpt2Bpe, [vocab[0], merges[0]]))
    if "tokenizer.json" in names:
        if found and not _is_plain_byte_level(path / "tokenizer.json"):
            found.clear()
        if not found:
            found.append((HuggingFace, [path / "tokenizer.json"]))
    found += [(SentencePiece, [path / name]) for name in sorted(names) if name.endswith(".model")]
    if len(found) != 1:
        rule = (
            "more than one tokenizer; give one file"
            if found
            else f"no tokenizer; accepted: {_ACCEPTED}"
        )
        raise ValueError(f"{path} holds {rule}. Found: {', '.join(sorted(names)) or 'nothing'}")
    return found[0]


def _is_plain_byte_level(file: Path) -> bool:
    try:
        return is_plain_byte_level(json.loads(file.read_bytes()))
    except (ValueError, AttributeError, TypeError):
        return False


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int,
                    directory: str | Path) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` ids on `texts` and save it to `directory`, new or
    empty.

    Args:
        kind: "bpe", GPT-2's byte-level BPE, any text round-trips; or "sentencepiece", BPE over
            characters with bytes for the rare ones, as in Llama: text round-trips but for U+2581,
            its mark for a space.
        texts: read once, as a stream.

    Raises:
        ValueError: unknown `kind`, a `directory` in use, or a `vocab_size` that these texts cannot
            fill or that is too small for the alphabet; the largest or smallest possible size is
            named.
    """
    trainers = {"bpe": _train_bpe, "sentencepiece": _train_sentencepiece}
    if kind not in trainers:
        raise ValueError(f"cannot train a tokenizer of kind {kind!r}; choose one of "
                         f"{sorted(trainers)}")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists; give a new or empty directory for the trained "
                         "tokenizer")
    tokenizer = trainers[kind](map(well_formed, texts), vocab_size)
    assert tokenizer.vocab_size == vocab_size
    tokenizer.save(directory)
    return tokenizer


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Gpt2Bpe:
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    smallest = 256 + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need "
                         f"{smallest}")
    learner = HuggingFaceTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet,
                                  show_progress=False)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    ids = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    if len(ids) < vocab_size:
        raise ValueError(_too_small_a_corpus(vocab_size, len(ids)))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    return Gpt2Bpe(json.dumps(ids, ensure_ascii=False).encode(),
                   ("\n".join(merges) + "\n").encode())


def _train_sentencepiece(texts: Iterator[str], vocab_size: int) -> SentencePiece:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_SENTENCE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_sentencepiece_remedy(vocab_size, str(error))) from None
    return SentencePiece(model.getvalue())


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def _sentencepiece_remedy(vocab_size: int, error: str) -> str:
    if largest := re.search(r"Please set it to a value <= (\d+)", error):
        return _too_small_a_corpus(vocab_size, int(largest[1]))
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (f"vocab_size {vocab_size} is too small: 256 bytes and the texts' characters need "
                f"{smallest[1]}")
    if "sentences_.empty()" in error:
        return "cannot train a tokenizer: the texts are empty"
    return f"SentencePiece could not train {vocab_size} pieces on these texts: {error}"


def _too_small_a_corpus(vocab_size: int, largest: int) -> str:
    return (
        f"vocab_size {vocab_size} is more than these texts give: at most {largest}. "
        "Ask for that or less, or train on more text"
    )
