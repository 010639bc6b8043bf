"""Tokenizers of Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from megatron_spdf.data.tokenizers.base import Tokenizer, well_formed
from megatron_spdf.data.tokenizers.gpt2 import END_OF_TEXT, Gpt2Bpe

# End-of-document tokens of published tokenizer.json files; the first that the vocabulary holds is
# taken.
END_OF_DOCUMENT = (END_OF_TEXT, "<|end_of_text|>", "</s>")


class HuggingFace(Tokenizer):
    """Whatever a `tokenizer.json` describes, run by `tokenizers`; its special tokens are never
    added.

    One that describes GPT-2's kind of BPE and nothing else is run by `tiktoken`, which gives the
    same ids sooner.
    """

    kind = "tokenizers"
    file_names = ("tokenizer.json",)

    def __init__(self, description: bytes):
        super().__init__(description)
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(description)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"not a tokenizer.json of Hugging Face's `tokenizers`: {error}"
            ) from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        eod = next((vocab[token] for token in END_OF_DOCUMENT if token in vocab), None)
        if eod is None:
            raise ValueError("no end-of-document token in tokenizer.json; it needs one of "
                             f"{END_OF_DOCUMENT}")
        self.vocab_size, self.eod = max(vocab.values()) + 1, eod
        self.gpt2 = _as_gpt2(json.loads(description))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return self.gpt2.encode_array(text) if self.gpt2 else super().encode_array(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [well_formed(text) for text in texts]
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def is_plain_byte_level(description: dict) -> bool:
    """Whether a tokenizer.json cuts words as GPT-2 does, so that its vocabulary and merges tell
    all."""
    cut = description.get("pre_tokenizer") or {}
    byte_level = (
        cut.get("type") == "ByteLevel"
        and cut.get("use_regex", True)
        and not cut.get("add_prefix_space", True)
    )
    return byte_level and description.get("normalizer") is None


def _as_gpt2(description: dict) -> Gpt2Bpe | None:
    """The tokenizer that a tokenizer.json describes as GPT-2's kind, where it is that to the last
    detail."""
    model = description.get("model") or {}
    plain = model.get("type") == "BPE" and not any(
        model.get(option) for option in ("dropout", "unk_token", "continuing_subword_prefix",
                                         "end_of_word_suffix",
                                         "byte_fallback", "ignore_merges"))
    added = {token["content"]: token for token in description.get("added_tokens") or []}
    if not plain or not is_plain_byte_level(description) or not set(added) <= {END_OF_TEXT}:
        return None
    if any(not token["special"] for token in added.values()):
        return None
    vocab = model["vocab"] | {content: token["id"] for content, token in added.items()}
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    try:
        return Gpt2Bpe(json.dumps(vocab).encode(), "\n".join(["#version: 0.2", *merges]).encode())
    except ValueError:
        return None
