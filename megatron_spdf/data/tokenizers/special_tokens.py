"""Special tokens in text: text that spells one stays text.

Libraries know three ways from text to a special token: it is an added token that is searched for,
an entry of the vocabulary that a whole word is looked up as, or a piece that others merge to. None
is left to a tokenizer whose special tokens have names that no text has.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def unspellable(description: dict[str, Any], specials: Iterable[str]) -> bytes:
    """A tokenizer.json that gives any text the ids that the description gives it, but never that of
    a special token, except the model's own for what it does not know.

    Args:
        description: content of a tokenizer.json.
        specials: the special tokens in it.
    """
    model, secret = dict(description["model"]), secrets.token_hex(16)
    specials = [token for token in specials  # bytes are what rare characters become
                if not (model.get("byte_fallback") and _BYTE.fullmatch(token))]
    names = {token: f"{secret}-{number}" for number, token in enumerate(sorted(specials))}
    if "vocab" in model:
        model["vocab"] = _renamed(model["vocab"], names)
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"]
                           if not names.keys() & _tokens_of(merge, prefix)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "dropout" in model:
        model["dropout"] = None  # ids would be others at every call
    added = [{**token, "content": names[token["content"]], "special": True, "normalized": False}
             if token["content"] in names else token
             for token in description.get("added_tokens") or []]
    return json.dumps({**description, "model": model, "added_tokens": added, "truncation": None,
                       "padding": None, "post_processor": None}).encode()


def _renamed(vocab: Any, names: dict[str, str]) -> Any:
    """A vocabulary, token -> id or of (piece, score), with other names for some of its tokens."""
    if isinstance(vocab, dict):
        return {names.get(token, token): number for token, number in vocab.items()}
    return [[names.get(piece, piece), score] for piece, score in vocab]


def _tokens_of(merge: str | list[str], prefix: str) -> set[str]:
    """The two tokens of a merge, and the one that becomes of them."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right.removeprefix(prefix)}
