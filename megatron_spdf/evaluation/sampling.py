"""Continuation of one text, token by token, by the generation of `transformers`.

A model of texts goes on from the text, which begins as its exported model would begin it. A model
that was fine-tuned on contexts and completions reads the text as a context, and says a completion,
as in decoding.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.evaluation.decoding import completion_ends, window_of
from megatron_spdf.text import counted

UNFINISHED = "\ufffd"  # of a character whose bytes have not all come
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # piece of one byte, of SentencePiece and its like
Ending = Literal["end", "tokens", "window"]


@dataclass(frozen=True)
class SamplingSettings:
    """Options of sampling. Where all but the number of tokens are None, text is greedy.

    Attributes:
        tokens: most of them that are added, over 0.
        temperature: that logits are divided by, over 0; None: 1.
        top_k: number of the likeliest tokens that are drawn from; None: all.
        top_p: the likeliest tokens are drawn from that together have this probability, over 0 and
            at most 1; None: all. Of the `top_k` where both are given.
    """

    tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature is self.top_k is self.top_p is None


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it speaks.

    Attributes:
        ids: tokens of the prompt, at least one.
        ends: ids after which the text is over.
    """

    ids: list[int]
    ends: list[int]


def text_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text to go on from, as the exported model reads it; empty: a new document."""
    begin = [] if tokenizer.begin_token is None else [tokenizer.bod]
    return Prompt([*begin, *tokenizer.encode(text)] or [tokenizer.prefix], tokenizer.ends)


def context_prompt(tokenizer: Tokenizer, context: str) -> Prompt:
    """The context of a completion, as in fine-tuning."""
    return Prompt([*tokenizer.encode(context), tokenizer.eod], completion_ends(tokenizer))


class Pieces:
    """Text of tokens that come one by one, in pieces that together are the text of them all.

    A piece ends with a whole character, which byte-level tokens may hold parts of; and not inside
    of a run of bytes, which some tokenizers read as a whole.

    Args:
        tokenizer: of the tokens.
        before: tokens of the prompt, on which the first blank may depend.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer, self._ids = tokenizer, list(before)
        self._said = len(tokenizer.decode(self._ids))

    def add(self, token: int) -> str:
        """The text that is certain with a further token, and was not before it."""
        self._ids.append(token)
        text = self._text()
        if token in self._bytes or text.endswith(UNFINISHED):
            return ""
        return self._new(text)

    def rest(self) -> str:
        """The text that is left when no more tokens come."""
        return self._new(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _new(self, text: str) -> str:
        new, self._said = text[self._said :], len(text)
        return new

    @cached_property
    def _bytes(self) -> set[int]:
        return {i for token, i in self._tokenizer.vocabulary.items() if _BYTE.fullmatch(token)}


class _Streamer(BaseStreamer):
    """Hands on the text of each new token."""

    def __init__(self, pieces: Pieces, ends: set[int], write: Callable[[str], None]):
        self._pieces, self._ends, self._write = pieces, ends, write
        self._prompt, self.ended = True, False

    def put(self, value: Tensor) -> None:
        """Takes ids: of the prompt first, then of one token after another."""
        if self._prompt:
            self._prompt = False
            return
        token = int(value.reshape(-1)[0])
        if token in self._ends:
            self.ended = True
        elif piece := self._pieces.add(token):
            self._write(piece)

    def end(self) -> None:
        """Hands on what is left."""
        if rest := self._pieces.rest():
            self._write(rest)


@torch.inference_mode()
def continue_text(model: PreTrainedModel, tokenizer: Tokenizer, prompt: Prompt,
                  settings: SamplingSettings, write: Callable[[str], None]) -> Ending:
    """Goes on from a prompt. Draws come from PyTorch's generator, which `torch.manual_seed` sets.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: of the model.
        prompt: of the same tokenizer.
        settings: of sampling.
        write: called with each piece of the text that is added, in their order, as soon as it is
            certain.

    Returns:
        Why the text is over: "end": the model ended it; "tokens": it has as many as asked for;
        "window": the model can read no further.

    Raises:
        ValueError: the window has no room for the prompt and one token.
    """
    room = window_of(model) - len(prompt.ids)
    if room < 1:
        raise ValueError(f"the prompt has {counted(len(prompt.ids), 'token')}, and the model reads "
                         f"{window_of(model):,} at once, the new ones among them; shorten it to at "
                         f"most {window_of(model) - 1:,} tokens")
    ids = torch.tensor([prompt.ids], device=model.device)  # (1, T)
    streamer = _Streamer(Pieces(tokenizer, prompt.ids), set(prompt.ends), write)
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer,
                   generation_config=generation_config(model, tokenizer, prompt, settings, room))
    if streamer.ended:
        return "end"
    return "tokens" if settings.tokens <= room else "window"


def generation_config(model: PreTrainedModel, tokenizer: Tokenizer, prompt: Prompt,
                      settings: SamplingSettings, room: int) -> GenerationConfig:
    """The settings in the words of `transformers`, with nothing left to a model's own.

    Args:
        room: most tokens that can be added.
    """
    drawn = {} if settings.greedy else {
        "temperature": 1.0 if settings.temperature is None else settings.temperature,
        "top_k": settings.top_k or 0, "top_p": 1.0 if settings.top_p is None else settings.top_p}
    return GenerationConfig(
        max_new_tokens=min(settings.tokens, room), num_beams=1, do_sample=not settings.greedy,
        eos_token_id=prompt.ends or None, pad_token_id=tokenizer.eod, bos_token_id=tokenizer.prefix,
        suppress_tokens=list(range(tokenizer.vocab_size, model.config.vocab_size)) or None, **drawn)
