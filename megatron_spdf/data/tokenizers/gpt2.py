"""GPT-2's byte-level BPE."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from megatron_spdf.data.tokenizers.base import (
    END_OF_TEXT,
    Tokenizer,
    too_small_a_corpus,
    well_formed,
)
from megatron_spdf.records.json_reader import parse_json

# Unicode's White_Space, which is what \s means to tiktoken; to Python it means more.
_BLANKS = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class Gpt2Bpe(Tokenizer):
    """Byte-level BPE over GPT-2's word pattern, run by `tiktoken`.

    `tiktoken` knows no merge list: it joins any two neighbors whose concatenation is a token,
    lowest id first. That equals applying the merges when ids are in merge order, which is checked
    here.
    """

    kind = "gpt2-bpe"
    file_names = ("vocab.json", "merges.txt")

    def __init__(self, vocab: bytes, merges: bytes, end: str | None = None):
        super().__init__(vocab, merges)
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        self.vocabulary = ids = _read_vocab(vocab)
        self.vocab_size = len(ids)
        self._end_documents(END_OF_TEXT if END_OF_TEXT in ids else None, end,
                            f"no {END_OF_TEXT} in the BPE vocabulary; if tokenizer.json adds it, "
                            "give that file")
        _require_gpt2_form(ids, _read_merges(merges), self.end_token)
        byte_of = _byte_of_character()
        self.ranks = {bytes(byte_of[c] for c in token): i for token, i in ids.items()
                      if token != self.end_token}
        self._encoding = tiktoken.Encoding(
            "gpt2-bpe", pat_str=r50k_pat_str, mergeable_ranks=self.ranks,
            special_tokens={self.end_token: self.eod}
        )

    def _encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        text = well_formed(text)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a run of white space so long that the regex engine runs out of stack
            parts = _before_last_blanks(text)
            return np.concatenate([self._encoding.encode_to_numpy(part, disallowed_special=())
                                   for part in parts])

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def text_bytes(self, ids: Iterable[int]) -> int:
        known = range(self.vocab_size)
        return len(self._encoding.decode_bytes([int(i) for i in ids
                                                if i != self.eod and i in known]))


def train(texts: Iterator[str], vocab_size: int) -> Gpt2Bpe:
    """Learns merges of bytes by `tokenizers`.

    Raises:
        ValueError: too few ids for the bytes, or more than the texts give.
    """
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
        raise ValueError(too_small_a_corpus(vocab_size, len(ids)))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    return Gpt2Bpe(json.dumps(ids, ensure_ascii=False).encode(),
                   ("\n".join(merges) + "\n").encode())


def _before_last_blanks(text: str) -> list[str]:
    """`text` cut before the last blank of every long run of blanks, where GPT-2's pattern cuts it
    in any case."""
    cuts = [m.end() - 1 for m in re.finditer(rf"[{_BLANKS}]{{1000,}}(?=[^{_BLANKS}])", text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _read_vocab(content: bytes) -> Mapping[str, int]:
    ids = parse_json(content, name="the BPE vocabulary")
    numbered = isinstance(ids, dict) and all(isinstance(i, int) for i in ids.values())
    if not numbered or set(ids.values()) != set(range(len(ids))):
        raise ValueError("the BPE vocabulary must be one JSON object: token -> id, ids 0 to n-1 "
                         "without gaps")
    return ids


def _read_merges(content: bytes) -> list[str]:
    lines = content.decode("utf-8").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return [line.rstrip("\r") for line in lines if line.strip()]


def _require_gpt2_form(ids: Mapping[str, int], merges: list[str], end: str) -> None:
    tokens = [token for token in sorted(ids, key=ids.get) if token != end]
    merged = [merge.replace(" ", "") for merge in merges]
    if set(tokens[:256]) == set(_byte_of_character()) and tokens[256:] == merged:
        return
    raise ValueError(
        f"the BPE files are not in GPT-2's form: their {len(ids)} tokens must be the 256 bytes, "
        f"one token for each of the {len(merges)} merges in the order of the merges, and "
        f"{end}. Save this tokenizer as tokenizer.json and give that file"
    )


def _byte_of_character() -> dict[str, int]:
    """GPT-2's visible character for each byte: Latin-1 where that is printable, else U+0100 and
    up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
