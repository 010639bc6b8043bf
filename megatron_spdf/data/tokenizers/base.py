"""The tokenizer interface; each kind is a file beside this one."""

from __future__ import annotations

import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_spdf.files import write_file, write_json

END_FILE = "end_of_document.txt"  # beside a tokenizer's files: the token, where one was named
BEGIN_FILE = "beginning_of_document.txt"  # the same of the token that a model begins texts with
DECLARED_FILE = "declared.json"  # the same of what transformers' files say of other uses
ENDS = "ends"  # in it: other tokens after which a text is over
END_OF_TEXT = "<|endoftext|>"
# End-of-document tokens of published tokenizers; the first that a vocabulary holds is taken.
END_OF_DOCUMENT = (END_OF_TEXT, "<|end_of_text|>", "</s>")


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
        end_token: that token, as the vocabulary has it.
        begin_token: token that somebody else's model was trained to see before a document; exported
            models keep it, `encode` never returns it, and training puts none. None: there is none.
        declared: what transformers' tokenizer_config.json says otherwise than documents do, and
            exported models keep: "bos_token" and "eos_token", of a chat's turns, and
            "chat_template"; and under "ends" the tokens after which generation_config.json says
            that a text is over, beside those.
        named_end: the same where it was named by somebody, None where it is the kind's usual one.
        vocabulary: token -> id.
        sha256: fingerprint of the files and of `named_end`, independent of names and place of the
            files.
        pad: -1, an id that no text has, so that Megatron masks no token as padding.
    """

    kind: ClassVar[str]
    file_names: ClassVar[tuple[str, ...]]
    vocab_size: int
    eod: int
    end_token: str
    begin_token: str | None = None
    declared: Mapping[str, Any] = {}
    named_end: str | None = None
    vocabulary: Mapping[str, int]
    pad: ClassVar[int] = -1

    def __init__(self, *files: bytes):
        assert len(files) == len(self.file_names), f"{self.kind} is made of {self.file_names}"
        self._files = files

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.kind.encode())
        for content in self._files:
            digest.update(hashlib.sha256(content).digest())
        if self.named_end:
            digest.update(self.named_end.encode())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        """True if it is of the same files."""
        return isinstance(other, Tokenizer) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def _end_documents(self, usual: str | None, named: str | None, missing: str) -> None:
        """Chooses the token that ends documents.

        Args:
            usual: of this kind of tokenizer, where the vocabulary has one.
            named: by somebody; it goes before.
            missing: says that there is no usual one.

        Raises:
            ValueError: there is none, or texts are full of it.
        """
        if named is None and usual is None:
            raise ValueError(f"{missing}, or name another token: --end-of-document of "
                             "tools/preprocess_data.py, data.end_of_document of a recipe, or a "
                             f"file {END_FILE} beside it")
        token = usual if named is None else named
        if token not in self.vocabulary:
            near = difflib.get_close_matches(token, [t for t in self.vocabulary if len(t) > 2], 3)
            raise ValueError(f"the vocabulary has no token {token!r} to end documents with; those "
                             f"most like it: {near or 'none'}")
        if len(token) < 2:
            raise ValueError(f"{token!r} cannot end documents, since texts have that character; "
                             "name a token that is a word of its own")
        self.eod, self.end_token = self.vocabulary[token], token
        self.named_end = None if token == usual else token

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """`encode` for well-formed text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """`decode` for ids that all have a token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8, and ids that no token has, such as those of rows
        that pad a model's vocabulary, become U+FFFD."""
        ids = [int(i) for i in ids]
        if all(0 <= i < self.vocab_size for i in ids):
            return self._decode(ids)
        ends = [n for n, i in enumerate(ids) if not 0 <= i < self.vocab_size]
        return "\ufffd".join(self._decode(ids[start + 1:end]) for start, end in
                             zip([-1, *ends], [*ends, len(ids)], strict=True))

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
            write_file(directory / name, content)
        for name, token in ((END_FILE, self.named_end), (BEGIN_FILE, self.begin_token)):
            if token:
                write_file(directory / name, token)
        if self.declared:
            write_json(directory / DECLARED_FILE, dict(self.declared))

    @property
    def bod(self) -> int:
        """Id of the token that begins documents; where none does, of the one that ends them."""
        return self.eod if self.begin_token is None else self.vocabulary[self.begin_token]

    @property
    def prefix(self) -> int:
        """Id of the token that a text without context is taken to follow: what transformers' files
        declare as its beginning, whether or not they put it there."""
        return self.vocabulary[self.declared["bos_token"]] if "bos_token" in self.declared else (
            self.bod)

    @property
    def ends(self) -> list[int]:
        """Ids after which a text is over: others that a model ends texts with, then that of a
        document, and last of a chat's turn where there is one."""
        turn = self.declared.get("eos_token")
        tokens = [*self.declared.get(ENDS, ()), self.end_token, *([] if turn is None else [turn])]
        return [self.vocabulary[token] for token in tokens]

    @property
    def eos(self) -> int:
        """Megatron's second name for `eod`."""
        return self.eod

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron hashes into the names of its cached sample indices."""
        return {"class": type(self).__name__, "kind": self.kind, "sha256": self.sha256}

    def __reduce__(self):
        return partial(type(self), end=self.named_end), self._files


def render_padding(tokenizer: Tokenizer, rows: int) -> str:
    """What the rows of a model's vocabulary are that no id of its tokenizer has, in a line; nothing
    where there are none."""
    ids = tokenizer.vocab_size
    return (f"{rows - ids:,} of the model's {rows:,} rows of the vocabulary pad it: the tokenizer "
            f"has {ids:,} ids, and none is ever decoded from the others") if rows > ids else ""


def too_small_a_corpus(vocab_size: int, largest: int) -> str:
    """Says that texts give fewer tokens than are asked for."""
    return (
        f"vocab_size {vocab_size} is more than these texts give: at most {largest}. "
        "Ask for that or less, or train on more text"
    )
