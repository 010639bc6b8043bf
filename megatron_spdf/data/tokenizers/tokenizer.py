"""Load a tokenizer from its files, or train a new one.

This is where a tokenizer that somebody else made is looked at: what it cannot promise is refused,
and what it loses of a text is said.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_spdf.data.tokenizers import gpt2, sentencepiece
from megatron_spdf.data.tokenizers.base import (
    BEGIN_FILE,
    DECLARED_FILE,
    END_FILE,
    ENDS,
    Tokenizer,
    well_formed,
)
from megatron_spdf.data.tokenizers.gpt2 import Gpt2Bpe
from megatron_spdf.data.tokenizers.huggingface import HuggingFace
from megatron_spdf.data.tokenizers.sentencepiece import SentencePiece
from megatron_spdf.files import open_regular, require_directory, require_fetched
from megatron_spdf.paths import real
from megatron_spdf.records.json_reader import read_json

__all__ = ["Tokenizer", "load_tokenizer", "tokenizer_files", "train_tokenizer"]

_ACCEPTED = (
    "GPT-2 BPE files (encoder.json or vocab.json, with vocab.bpe or merges.txt), "
    "a Hugging Face tokenizer.json, or one SentencePiece *.model"
)
# The files of each kind, by every name that they are published under; the kind that says most about
# a tokenizer comes first.
_FILES: dict[type[Tokenizer], tuple[tuple[str, ...], ...]] = {
    HuggingFace: (("tokenizer.json",),),
    Gpt2Bpe: (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")),
    SentencePiece: (("*.model",),),
}
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"  # beside them, of transformers
_CHAT, _MAP = "chat_template.jinja", "special_tokens_map.json"
_MORE_CHATS, _GENERATION = "additional_chat_templates", "generation_config.json"
# What a tokenizer may lose of a text, and a text that shows it.
_LOSSES = {"runs of blanks": "a  b", "blanks at the ends": " a ", "line breaks": "a\nb",
           "tabs": "a\tb", "capitals": "a A", "composed characters": "e\u0301",
           "compatibility characters": "\ufb01 \uff41 \u2460", "rare characters":
           "\u6f22\u0436\U0001f600\U00010380", "control characters": "a\x01b"}
logger = logging.getLogger(__name__)


def load_tokenizer(path: str | Path, end: str | None = None) -> Tokenizer:
    """The tokenizer whose files lie in the directory `path`, or whose one file `path` is.

    Where a directory describes a tokenizer more than once, as published models do, the description
    of the most ids is taken, and of equals tokenizer.json; a difference is said. The end of
    documents is `end`, else what was named when the tokenizer was saved, else a token that usually
    is, else the eos_token of tokenizer_config.json.

    Args:
        end: token that ends documents.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: `path` holds no tokenizer, more than one, or a damaged one; or one that would
            make text into special tokens, or that cannot encode every text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}; accepted: {_ACCEPTED}. One of the "
                                "Hugging Face hub is downloaded first")
    if path.is_dir() and end is None:
        end = _saved_end(path)
    candidates = _find_in_directory(path) if path.is_dir() else [_find_file(path)]
    try:
        tokenizer = _richest(path, candidates, end)
        lost = _losses(tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if lost:
        _say(f"{path}: this tokenizer does not keep {', '.join(lost)}; texts are trained on and "
             "decoded without them")
    if path.is_dir():
        tokenizer.begin_token = _beginning(path, tokenizer)
        tokenizer.declared = _declared(path, tokenizer)
        _compare_with_config(path, tokenizer)
    return tokenizer


def tokenizer_files(directory: Path) -> list[Path]:
    """Files in a directory that describe a tokenizer, or are a part of one that does."""
    patterns = [name for files in _FILES.values() for names in files for name in names]
    return sorted(file for file in directory.iterdir() if any(map(file.match, patterns)))


def _find_file(path: Path) -> tuple[type[Tokenizer], list[Path]]:
    if path.name in (name for names in _FILES[Gpt2Bpe] for name in names):
        raise ValueError(f"{path} is one of the two files of a GPT-2 BPE; give the directory that "
                         "has both")
    kinds = {".json": HuggingFace, ".model": SentencePiece}
    if path.suffix not in kinds:
        raise ValueError(f"{path} is not a tokenizer; accepted: a directory or file with "
                         f"{_ACCEPTED}")
    return kinds[path.suffix], [path]


def _find_in_directory(path: Path) -> list[tuple[type[Tokenizer], list[Path]]]:
    """All whole descriptions of a tokenizer in a directory."""
    found, there = [], tokenizer_files(path)
    for kind, files in _FILES.items():
        parts = [[file for name in names for file in there if file.match(name)] for names in files]
        found += [(kind, [part[0] for part in parts])] if all(parts) else []
    rule = f"no tokenizer; accepted: {_ACCEPTED}" if not found else ""
    if sum(file.match("*.model") for file in there) > 1:
        rule = "more than one tokenizer; give one file"
    if rule:
        names = sorted(file.name for file in path.iterdir())
        raise ValueError(f"{path} holds {rule}. Found: {', '.join(names) or 'nothing'}")
    return found


def _richest(path: Path, candidates: list[tuple[type[Tokenizer], list[Path]]],
             end: str | None) -> Tokenizer:
    """The tokenizer that most is said of. One that GPT-2's files describe as well as tokenizer.json
    is theirs."""
    made: dict[str, Tokenizer] = {}
    for kind, files in candidates:
        contents = [_content(file) for file in files]
        if kind is not SentencePiece:  # lines of text, which a checkout may have ended with CR LF
            contents = [content.replace(b"\r\n", b"\n") for content in contents]
        try:
            made[files[0].name] = _with_end(path, kind, contents, end)
        except ValueError:
            if kind is HuggingFace or len(candidates) == 1:
                raise
    name, best = max(made.items(), key=lambda item: item[1].vocab_size)
    same = [other for other in made.values()
            if isinstance(best, HuggingFace) and isinstance(other, Gpt2Bpe) and best.gpt2
            and (best.gpt2.ranks, best.eod) == (other.ranks, other.eod)]
    for rival, other in made.items():
        if other not in (best, *same) and (why := _difference(best, other)):
            _say(f"{path} describes two tokenizers: {why}; {name} is used, and not {rival}. Remove "
                 "the one that the model was not trained with")
    return (same or [best])[0]


def _with_end(path: Path, kind: type[Tokenizer], contents: list[bytes],
              end: str | None) -> Tokenizer:
    try:
        return kind(*contents, end=end)
    except ValueError:
        configured = _configured_end(path)
        if end or not configured:
            raise
        return kind(*contents, end=configured)


def _difference(one: Tokenizer, other: Tokenizer) -> str:
    """Difference of two tokenizers; nothing where they give the same ids."""
    if one.vocab_size != other.vocab_size:
        return f"one of {one.vocab_size:,} and one of {other.vocab_size:,} ids"
    if one.eod != other.eod:
        return (f"one ends documents with {one.end_token!r}, id {one.eod}, and one with "
                f"{other.end_token!r}, id {other.eod}")
    for text in (*_LOSSES.values(), "The quick brown fox, 12 times; it's done."):
        if one.encode(text) != other.encode(text):
            return f"{text!r} has the ids {one.encode(text)} in one and {other.encode(text)} in one"
    return ""


def _losses(tokenizer: Tokenizer) -> list[str]:
    """What texts lose as ids.

    Raises:
        ValueError: one cannot be encoded, or becomes the end of a document.
    """
    if isinstance(tokenizer, Gpt2Bpe):  # of a form that keeps every byte, as has been checked
        return []
    lost = []
    for what, text in {**_LOSSES, "the name of its end-of-document token": tokenizer.end_token,
                       "": f"a {tokenizer.end_token}b"}.items():
        try:
            ids = tokenizer.encode(text)
        except Exception as error:  # the libraries raise no narrower class
            raise ValueError(f"it cannot encode {text!r} ({error}); give it a token for what it "
                             "does not know") from None
        if tokenizer.eod in ids:
            raise ValueError(f"it makes the end of a document, {tokenizer.end_token!r}, of the "
                             f"text {text!r}; name another token as the end of documents")
        lost += [what] if what and tokenizer.decode(ids) != text else []
    return lost


def _saved_end(directory: Path) -> str | None:
    file = directory / END_FILE
    return _content(file).decode().strip() or None if file.exists() else None


def _content(file: Path) -> bytes:
    """Bytes of a file without a byte order mark, which no library that reads these files expects;
    Hugging Face's cache has links to them."""
    require_fetched(file)
    try:
        with open_regular(real(file)) as opened:
            return opened.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}); copy it again") from None


def _configured_end(path: Path, name: str = _CONFIG) -> str | None:
    """The eos_token of a file of transformers' beside a tokenizer."""
    file = path / name
    if not file.is_file():
        return None
    return _content_of(read_json(file, dict[str, Any]).get("eos_token"))


def _content_of(token: Any) -> str | None:
    """Text of a token as transformers' files have it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _beginning(path: Path, tokenizer: Tokenizer) -> str | None:
    """The token that transformers puts before a text with the files beside a tokenizer."""
    saved, config = path / BEGIN_FILE, path / _CONFIG
    if saved.exists():
        token = _content(saved).decode().strip()
    elif not config.is_file():
        return None
    else:
        said = read_json(config, dict[str, Any])
        token = _content_of(said.get("bos_token"))
        description = path / "tokenizer.json"
        added = (token is not None and description.is_file()
                 and token in str(read_json(description, dict[str, Any]).get("post_processor")))
        usual = said.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        if not added and not said.get("add_bos_token", usual and not description.is_file()):
            return None
    return token if token in tokenizer.vocabulary else None


def _declared(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers' files beside a tokenizer say that documents do not tell."""
    saved, config = path / DECLARED_FILE, path / _CONFIG
    said = next((read_json(file, dict[str, Any]) for file in (saved, config) if file.is_file()), {})
    if not saved.is_file():
        said |= {"chat_template": _chat_templates(path, said.get("chat_template")),
                 ENDS: _ends_of_generation(path, tokenizer)}
    usual = {"bos_token": tokenizer.begin_token or tokenizer.end_token,
             "eos_token": tokenizer.end_token}
    declared = {name: _content_of(said.get(name)) for name in usual}
    declared = {name: token for name, token in declared.items()
                if token in tokenizer.vocabulary and token != usual[name]}
    ends, template = said.get(ENDS), said.get("chat_template")
    known = [token for token in ends if isinstance(token, str) and token in tokenizer.vocabulary
             and token not in (tokenizer.end_token, declared.get("eos_token"))] if isinstance(
                 ends, list) else []
    return (declared | ({"chat_template": template} if _is_template(template) else {})
            | ({ENDS: known} if known else {}))


def _is_template(said: Any) -> bool:
    """Whether this is a template, or {name, template} of each of several."""
    return isinstance(said, str) or isinstance(said, list) and bool(said) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str) for one in said)


def _chat_templates(path: Path, configured: Any) -> Any:
    """Templates as tokenizer_config.json has them: a text, or {name, template} of each where there
    are several; files of their own, which newer releases of transformers write, go before."""
    texts = {file.stem: _content(file).decode()
             for file in sorted((path / _MORE_CHATS).glob("*.jinja"))}
    main = path / _CHAT
    usual = _content(main).decode() if main.is_file() else configured
    if not texts:
        return usual
    named = {"default": usual} if isinstance(usual, str) else {}
    return [{"name": name, "template": text} for name, text in {**named, **texts}.items()]


def _ends_of_generation(path: Path, tokenizer: Tokenizer) -> list[str]:
    """Tokens after which generation_config.json says that a text is over, where it lists several;
    one alone may be its default, which means nothing."""
    file = path / _GENERATION
    said = read_json(file, dict[str, Any]).get("eos_token_id") if file.is_file() else None
    ids = said if isinstance(said, list) else []
    tokens = {number: token for token, number in tokenizer.vocabulary.items()}
    return [tokens[number] for number in ids if type(number) is int and number in tokens]


def _compare_with_config(path: Path, tokenizer: Tokenizer) -> None:
    """Says what transformers' files beside a tokenizer say otherwise."""
    said: dict[str | None, str] = {}  # end of documents -> first file that says so
    for name in (_CONFIG, _MAP):
        said.setdefault(_configured_end(path, name), name)
    for configured, name in said.items():
        if configured and not tokenizer.named_end and configured != tokenizer.end_token:
            _say(f"{path}: documents end with {tokenizer.end_token!r}, and {name} says "
                 f"{configured!r}; where that is meant, write it to {END_FILE} there")
    added = path / _ADDED
    if added.is_file() and not isinstance(tokenizer, HuggingFace):
        more = sorted(read_json(added, dict[str, int]).keys() - tokenizer.vocabulary.keys())
        if more:
            _say(f"{path}: {_ADDED} adds {', '.join(map(repr, more[:4]))}"
                 f"{' and more' if len(more) > 4 else ''}, which the files beside it do not have; "
                 "no text becomes these tokens. Save the tokenizer as tokenizer.json to have them")


@cache
def _say(sentence: str) -> None:
    """A warning, once."""
    logger.warning(sentence)


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
    require_directory(directory, "tokenizer")
    tokenizer = trainers[kind](map(well_formed, texts), vocab_size)
    assert tokenizer.vocab_size == vocab_size
    tokenizer.save(directory)
    return tokenizer
