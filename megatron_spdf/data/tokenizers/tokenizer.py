"""Load a tokenizer from its files, or train a new one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_spdf.data.tokenizers import gpt2, sentencepiece
from megatron_spdf.data.tokenizers.base import Tokenizer, well_formed
from megatron_spdf.data.tokenizers.gpt2 import Gpt2Bpe
from megatron_spdf.data.tokenizers.huggingface import HuggingFace, is_plain_byte_level
from megatron_spdf.data.tokenizers.sentencepiece import SentencePiece

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]

_ACCEPTED = (
    "GPT-2 BPE files (encoder.json or vocab.json, with vocab.bpe or merges.txt), "
    "a Hugging Face tokenizer.json, or one SentencePiece *.model"
)


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
    trainers = {"bpe": gpt2.train, "sentencepiece": sentencepiece.train}
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
