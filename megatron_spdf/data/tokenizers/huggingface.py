"""Tokenizers of Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_spdf.data.tokenizers.base import END_OF_DOCUMENT, Tokenizer, well_formed
from megatron_spdf.data.tokenizers.gpt2 import Gpt2Bpe
from megatron_spdf.data.tokenizers.special_tokens import unspellable
from megatron_spdf.records.json_reader import parse_json


class HuggingFace(Tokenizer):
    """Whatever a `tokenizer.json` describes, run by `tokenizers`; its special tokens are never
    added, and never found in text.

    One that describes GPT-2's kind of BPE and nothing else is run by `tiktoken`, which gives the
    same ids sooner.
    """

    kind = "tokenizers"
    file_names = ("tokenizer.json",)

    def __init__(self, content: bytes, end: str | None = None):
        super().__init__(content)
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"not a tokenizer.json of Hugging Face's `tokenizers`: {error}"
            ) from None
        description = parse_json(content, dict[str, Any], "tokenizer.json")
        self._specials = {token["content"] for token in description.get("added_tokens") or []
                          if token["special"]}
        usual = next((token for tokens in (self._specials, self.vocabulary)
                      for token in END_OF_DOCUMENT if token in tokens), None)
        self._require_own_ids(description.get("added_tokens") or [])
        self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
        self._end_documents(usual, end, "no end-of-document token in tokenizer.json; it needs "
                            f"one of {END_OF_DOCUMENT}")
        self.gpt2 = _as_gpt2(description, self.end_token)
        self._encoder = self._tokenizer if self.gpt2 else self._without_specials(description)
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def _require_own_ids(self, added: Sequence[dict[str, Any]]) -> None:
        """Raises a ValueError where two tokens have one id, which is decoded to one of them, or a
        token has another than the file says, as where ids before it are missing.

        Args:
            added: the tokens that the file adds to its vocabulary.
        """
        for token in added:
            name, given = token["content"], self.vocabulary.get(token["content"])
            if given != token["id"]:
                raise ValueError(f"tokenizer.json gives the token {name!r} the id {token['id']}, "
                                 f"and Hugging Face's `tokenizers` reads it as {given}; add tokens "
                                 "that have the ids before it, or write the id that it has")
        tokens: dict[int, str] = {}
        for token, number in self.vocabulary.items():
            if tokens.setdefault(number, token) != token:
                one, other = sorted([tokens[number], token])
                raise ValueError(f"tokenizer.json gives {one!r} and {other!r} the id {number}, so "
                                 "that one would be decoded to the other; take the file that the "
                                 "model was trained with")

    def _without_specials(self, description: dict[str, Any]) -> Any:
        """The tokenizer for text, which special tokens cannot come from.

        Raises:
            ValueError: what it does not know would become the end of a document.
        """
        import tokenizers

        model = description["model"]
        unknown = model.get("unk_token")
        if isinstance(model.get("vocab"), list) and model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        if unknown == self.end_token and "merges" in model:  # BPE can do without
            description = {**description, "model": {**model, "unk_token": None}}
        elif unknown == self.end_token:
            raise ValueError(f"{self.end_token!r} is the token of unknown text, which would end "
                             "documents; name another token as their end")
        names, pieces = self._specials | {self.end_token}, model.get("vocab") or {}
        apart = names.isdisjoint(pieces if isinstance(pieces, dict) else dict(pieces))
        if apart and names == self._specials and not model.get("dropout"):
            return self._tokenizer  # which looks for added tokens only, and is told not to
        encoder = tokenizers.Tokenizer.from_buffer(unspellable(description, names))
        assert len(encoder.get_vocab()) == len(self.vocabulary), "the ids are no longer the same"
        return encoder

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return self.gpt2.encode_array(text) if self.gpt2 else super().encode_array(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [well_formed(text) for text in texts]
        return [e.ids for e in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _is_plain_byte_level(description: dict[str, Any]) -> bool:
    """True if a tokenizer.json cuts words as GPT-2 does, so that its vocabulary and merges tell
    all."""
    cut = description.get("pre_tokenizer") or {}
    byte_level = (
        cut.get("type") == "ByteLevel"
        and cut.get("use_regex", True)
        and not cut.get("add_prefix_space", True)
    )
    return byte_level and description.get("normalizer") is None


def _as_gpt2(description: dict[str, Any], end: str) -> Gpt2Bpe | None:
    """The tokenizer that a tokenizer.json describes as GPT-2's kind, where it is that to the last
    detail."""
    model = description.get("model") or {}
    plain = model.get("type") == "BPE" and not any(
        model.get(option) for option in ("dropout", "unk_token", "continuing_subword_prefix",
                                         "end_of_word_suffix",
                                         "byte_fallback", "ignore_merges"))
    added = {token["content"]: token for token in description.get("added_tokens") or []}
    if not plain or not _is_plain_byte_level(description) or not set(added) <= {end}:
        return None
    if any(not token["special"] for token in added.values()):
        return None
    vocab = model["vocab"] | {content: token["id"] for content, token in added.items()}
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    try:
        return Gpt2Bpe(json.dumps(vocab).encode(), "\n".join(["#version: 0.2", *merges]).encode(),
                       end)
    except ValueError:
        return None
