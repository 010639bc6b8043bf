"""The tokenizer interface and its kinds: GPT-2 byte-level BPE, Hugging Face `tokenizers`,
SentencePiece."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

END_OF_TEXT = "<|endoftext|>"
# End-of-document tokens of published tokenizer.json files; the first that the vocabulary holds is
# taken.
END_OF_DOCUMENT = (END_OF_TEXT, "<|end_of_text|>", "</s>")
# Unicode's White_Space, which is what \s means to tiktoken; to Python it means more.
_BLANKS = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def well_formed(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8 form, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer(ABC):
    """Text to token ids and back; also what Megatron's `GPTDataset` asks of a tokenizer.

    Built from the bytes of its files, which it keeps: `save` writes what was loaded, whatever has
    become of the originals, and a tokenizer travels to another process as its files.

    Attributes:
        kind: "gpt2-bpe", "tokenizers" or "sentencepiece".
        vocab_size: number of ids; every id is in [0, vocab_size).
        eod: id of the end-of-document token. `encode` never returns it.
        sha256: fingerprint of the files, independent of their names and place.
        pad: -1, an id that no text has, so that Megatron masks no token as padding.
    """

    kind: ClassVar[str]
    file_names: ClassVar[tuple[str, ...]]
    vocab_size: int
    eod: int
    pad: ClassVar[int] = -1

    def __init__(self, *files: bytes):
        assert len(files) == len(self.file_names), f"{self.kind} is made of {self.file_names}"
        self._files = files
        digest = hashlib.sha256(self.kind.encode())
        for content in files:
            digest.update(hashlib.sha256(content).digest())
        self.sha256 = digest.hexdigest()

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """`encode` for well-formed text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def text_bytes(self, ids: Iterable[int]) -> int:
        """UTF-8 bytes of the text of `ids`; end-of-document tokens have none.

        Where `ids` start or end inside a character, of which byte-level tokens hold a part, a few
        bytes more.
        """
        return len(self.decode(i for i in ids if i != self.eod).encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the names of special tokens in it are ordinary text."""
        return self._encode(well_formed(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an integer array (T,), without a Python list in between where the library
        can."""
        return np.asarray(self.encode(text), dtype=np.int64)

    def save(self, directory: str | Path) -> None:
        """Write the files to `directory`, new or empty; `load_tokenizer` gives this tokenizer from
        there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty; a tokenizer is saved to a directory of "
                             "its own")
        for name, content in zip(self.file_names, self._files, strict=True):
            (directory / name).write_bytes(content)

    @property
    def eos(self) -> int:
        """Megatron's second name for `eod`."""
        return self.eod

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron hashes into the names of its cached sample indices."""
        return {"class": type(self).__name__, "kind": self.kind, "sha256": self.sha256}

    def __reduce__(self):
        return type(self), self._files


class Gpt2Bpe(Tokenizer):
    """Byte-level BPE over GPT-2's word pattern, run by `tiktoken`.

    `tiktoken` knows no merge list: it joins any two neighbors whose concatenation is a token,
    lowest id first. That equals applying the merges when ids are in merge order, which is checked
    here.
    """

    kind = "gpt2-bpe"
    file_names = ("vocab.json", "merges.txt")

    def __init__(self, vocab: bytes, merges: bytes):
        super().__init__(vocab, merges)
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        ids = _read_vocab(vocab)
        self.vocab_size, self.eod = len(ids), ids[END_OF_TEXT]
        _require_gpt2_form(ids, _read_merges(merges))
        byte_of = _byte_of_character()
        ranks = {bytes(byte_of[c] for c in token): i for token,
                 i in ids.items() if token != END_OF_TEXT}
        self._encoding = tiktoken.Encoding(
            "gpt2-bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eod}
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

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])

    def text_bytes(self, ids: Iterable[int]) -> int:
        return len(self._encoding.decode_bytes([int(i) for i in ids if i != self.eod]))


def _before_last_blanks(text: str) -> list[str]:
    """`text` cut before the last blank of every long run of blanks, where GPT-2's pattern cuts it
    in any case."""
    cuts = [m.end() - 1 for m in re.finditer(rf"[{_BLANKS}]{{1000,}}(?=[^{_BLANKS}])", text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


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

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePiece(Tokenizer):
    """A SentencePiece model; its end-of-sentence piece `</s>` ends documents."""

    kind = "sentencepiece"
    file_names = ("tokenizer.model",)

    def __init__(self, model: bytes):
        super().__init__(model)
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        self.vocab_size, self.eod = self._processor.vocab_size(), self._processor.eos_id()
        if self.eod < 0:
            raise ValueError("the SentencePiece model has no </s> to end documents; train it with "
                             "an eos_id")

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


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


def _read_vocab(content: bytes) -> Mapping[str, int]:
    try:
        ids = json.loads(content)
    except ValueError as error:
        raise ValueError(f"the BPE vocabulary is not JSON: {error}") from None
    numbered = isinstance(ids, dict) and all(isinstance(i, int) for i in ids.values())
    if not numbered or set(ids.values()) != set(range(len(ids))):
        raise ValueError("the BPE vocabulary must be one JSON object: token -> id, ids 0 to n-1 "
                         "without gaps")
    if END_OF_TEXT not in ids:
        raise ValueError(f"no {END_OF_TEXT} in the BPE vocabulary; if tokenizer.json adds it, give "
                         "that file")
    return ids


def _read_merges(content: bytes) -> list[str]:
    lines = content.decode("utf-8").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return [line.rstrip("\r") for line in lines if line.strip()]


def _require_gpt2_form(ids: Mapping[str, int], merges: list[str]) -> None:
    tokens = [token for token in sorted(ids, key=ids.get) if token != END_OF_TEXT]
    merged = [merge.replace(" ", "") for merge in merges]
    if set(tokens[:256]) == set(_byte_of_character()) and tokens[256:] == merged:
        return
    raise ValueError(
        f"the BPE files are not in GPT-2's form: their {len(ids)} tokens must be the 256 bytes, "
        f"one token for each of the {len(merges)} merges in the order of the merges, and "
        f"{END_OF_TEXT}. Save this tokenizer as tokenizer.json and give that file"
    )


def _byte_of_character() -> dict[str, int]:
    """GPT-2's visible character for each byte: Latin-1 where that is printable, else U+0100 and
    up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
