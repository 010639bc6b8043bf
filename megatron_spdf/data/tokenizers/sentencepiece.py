"""SentencePiece models."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from megatron_spdf.data.tokenizers.base import END_OF_DOCUMENT, Tokenizer, too_small_a_corpus

# SentencePiece drops training sentences longer than its limit in bytes; a character has at most 4.
_SENTENCE_CHARACTERS = 2048
_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS


class SentencePiece(Tokenizer):
    """A SentencePiece model; its end-of-sentence piece, `</s>`, ends documents."""

    kind = "sentencepiece"
    file_names = ("tokenizer.model",)

    def __init__(self, model: bytes, end: str | None = None):
        super().__init__(model)
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from None
        self.vocab_size, eos = self._processor.vocab_size(), self._processor.eos_id()
        usual = (self._processor.id_to_piece(eos) if eos >= 0 else
                 next((token for token in END_OF_DOCUMENT if token in self.vocabulary), None))
        self._end_documents(usual, end, "the SentencePiece model has no </s> to end documents; "
                            "train it with an eos_id")
        if self.eod == self._processor.unk_id():
            raise ValueError(f"{self.end_token!r} is the piece of unknown text, which would end "
                             "documents; name another as their end")
        self._encoder = self._processor
        if not self._processor.is_control(self.eod):
            self._encoder = sentencepiece.SentencePieceProcessor(
                model_proto=_as_control(model, self.eod))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    @property
    def adds_blank(self) -> bool:
        """True if a text is read with a blank before it, as Llama 2 and Mistral do."""
        return _described(self._files[0]).normalizer_spec.add_dummy_prefix

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def _as_control(model: bytes, piece: int) -> bytes:
    """The model with a piece that text cannot become, as it does with a symbol of a user's."""
    described = _described(model)
    described.pieces[piece].type = described.SentencePiece.CONTROL
    return described.SerializeToString()


def _described(model: bytes) -> Any:
    """The content of a model's file."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)


def train(texts: Iterator[str], vocab_size: int) -> SentencePiece:
    """Learns BPE over characters, with bytes for the rare ones.

    Raises:
        ValueError: what SentencePiece refuses, with the size that it would take.
    """
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
        raise ValueError(_remedy(vocab_size, str(error))) from None
    return SentencePiece(model.getvalue())


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def _remedy(vocab_size: int, error: str) -> str:
    if largest := re.search(r"Please set it to a value <= (\d+)", error):
        return too_small_a_corpus(vocab_size, int(largest[1]))
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (f"vocab_size {vocab_size} is too small: 256 bytes and the texts' characters need "
                f"{smallest[1]}")
    if "sentences_.empty()" in error:
        return "cannot train a tokenizer: the texts are empty"
    return f"SentencePiece could not train {vocab_size} pieces on these texts: {error}"
