"""Prompts, beam search by `transformers`, and the perplexity of completions, on one rank or
several.

A prompt is the context and the end-of-document token, as in fine-tuning; the model continues with "
" + completion and ends with another end-of-document token, or at a blank line (Hu et al., 2022, the
NLG examples of LoRA).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
)

from megatron_spdf.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """How to decode; the defaults are LoRA's for E2E, which SPDF follows.

    Attributes:
        beams: width of the beam; 1 is greedy.
        length_penalty: the log-probability of a hypothesis is divided by its length to this power.
        no_repeat_ngram: no completion has an n-gram of this many tokens twice; 0 allows any.
            N-grams of the prompt may be repeated, since a text names what the prompt names.
        max_new_tokens: of a completion.
        batch_size: prompts decoded together; changes no text.
    """

    beams: int = 10
    length_penalty: float = 0.8
    no_repeat_ngram: int = 4
    max_new_tokens: int = 64
    batch_size: int = 32


@dataclass(frozen=True)
class Decoded:
    """A share of the completions.

    Attributes:
        texts: index of the prompt -> completion, outer blanks removed.
        tokens: of all completions, the end included.
        seconds: that decoding took.
        truncated: prompts that lost the beginning of their context.
    """

    texts: dict[int, str]
    tokens: int
    seconds: float
    truncated: int


class _NoRepeatInCompletion(NoRepeatNGramLogitsProcessor):
    """Sees the completion only, where that of `transformers` bans n-grams of the prompt as well."""

    def __init__(self, size: int, prompt_length: int):
        super().__init__(size)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids[:, self._prompt_length :], scores)


def window_of(model: PreTrainedModel) -> int:
    """Tokens that the model can read at once."""
    return model.config.max_position_embeddings


def decode(model: PreTrainedModel, tokenizer: Tokenizer, contexts: Sequence[str],
           settings: Settings, rank: int = 0, world: int = 1) -> Decoded:
    """This rank's share of the completions; prompts of like length are decoded together.

    A prompt that leaves no room for `max_new_tokens` loses the beginning of its context.

    Raises:
        ValueError: the window has no room for so many new tokens.
    """
    room = window_of(model) - settings.max_new_tokens - 1
    if room < 1:
        raise ValueError(f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in "
                         f"the window of {window_of(model)} tokens; give at most "
                         f"{window_of(model) - 2}")
    encoded = [tokenizer.encode(context) for context in contexts]
    prompts = [ids[max(0, len(ids) - room) :] + [tokenizer.eod] for ids in encoded]
    share = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))[rank::world]
    texts, tokens, start = {}, 0, time.monotonic()
    with tqdm(total=len(share), unit="input", desc=f"decode, rank 0 of {world}",
              disable=rank > 0 or None) as bar:
        for first in range(0, len(share), settings.batch_size):
            chosen = share[first : first + settings.batch_size]
            completions = _complete(model, tokenizer, [prompts[i] for i in chosen], settings)
            texts |= {i: tokenizer.decode(ids).strip() for i,
                      ids in zip(chosen, completions, strict=True)}
            tokens += sum(len(ids) + 1 for ids in completions)
            bar.update(len(chosen))
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    truncated = sum(len(encoded[i]) > room for i in share)
    return Decoded(texts, tokens, time.monotonic() - start, truncated)


@torch.inference_mode()
def _complete(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]],
              s: Settings) -> list[list[int]]:
    """The best completion of each prompt, without what ends it."""
    longest = max(map(len, prompts))
    # (B, T)
    ids = torch.tensor([[tokenizer.eod] * (longest - len(p)) + p for p in prompts],
                       device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
                        device=model.device)
    ends = _ends(tokenizer)
    config = GenerationConfig(
        num_beams=s.beams, length_penalty=s.length_penalty if s.beams > 1 else None,
        max_new_tokens=s.max_new_tokens, do_sample=False, eos_token_id=ends,
        pad_token_id=tokenizer.eod, bos_token_id=tokenizer.eod)
    processors = LogitsProcessorList()
    if s.no_repeat_ngram:
        processors.append(_NoRepeatInCompletion(s.no_repeat_ngram, longest))
    out = model.generate(ids, attention_mask=mask, generation_config=config,
                         logits_processor=processors)
    return [_until(row, set(ends)) for row in out[:, longest:].tolist()]


def _ends(tokenizer: Tokenizer) -> list[int]:
    """End of document, and the blank line where that is one token (628 in GPT-2's vocabulary)."""
    blank = tokenizer.encode("\n\n")
    return [tokenizer.eod, *(blank if len(blank) == 1 else [])]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@dataclass(frozen=True)
class Likelihood:
    """Of a share of the completions given their contexts.

    Attributes:
        nats: negative log-likelihood, summed over the tokens.
        tokens: of the completions, the end-of-document tokens included.
    """

    nats: float
    tokens: int


@torch.inference_mode()
def likelihood(model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]],
               rank: int = 0, world: int = 1, batch_tokens: int = 8192) -> Likelihood:
    """This rank's share of the completions' log-likelihood; exp(nats / tokens) over all is their
    perplexity.

    Args:
        pairs: (context, completion); a pair longer than the window loses the beginning of its
            context.
        batch_tokens: at most that many tokens, padding included, are read at once.

    Raises:
        ValueError: a completion alone is longer than the window.
    """
    sequences = [_sequence(tokenizer, context, completion, window_of(model)) for context,
                 completion in pairs]
    share = sorted(sequences, key=lambda s: -len(s[0]))[rank::world]
    nats, tokens, first = 0.0, 0, 0
    with tqdm(total=len(share), unit="pair", desc=f"perplexity, rank 0 of {world}",
              disable=rank > 0 or None) as bar:
        while first < len(share):
            longest = len(share[first][0])
            batch = share[first : first + max(1, batch_tokens // longest)]
            first += len(batch)
            ids = torch.tensor([ids + [tokenizer.eod] * (longest - len(ids)) for ids, _ in batch],
                               device=model.device)
            # (B, T): token t is predicted from position t - 1; padding follows and is not looked at
            # by what precedes it
            counted = torch.tensor([[start <= t < len(ids) for t in range(1, longest)] for ids,
                                    start in batch],
                                   device=model.device)
            hidden = model.base_model(ids[:, :-1]).last_hidden_state[counted]  # (N, H)
            logits = model.get_output_embeddings()(hidden).float()
            nats += float(cross_entropy(logits, ids[:, 1:][counted], reduction="sum"))
            tokens += int(counted.sum())
            bar.update(len(batch))
    return Likelihood(nats, tokens)


def _sequence(tokenizer: Tokenizer, context: str, completion: str,
              window: int) -> tuple[list[int], int]:
    """context + EOD + " " + completion + EOD, whose last token is not read; and where the
    completion begins."""
    target = [*tokenizer.encode(f" {completion}"), tokenizer.eod]
    room = window - len(target)
    if room < 0:
        raise ValueError(f"the completion {completion[:60]!r} has {len(target)} tokens and does "
                         f"not fit the window of {window} together with the token that precedes it")
    ids = tokenizer.encode(context)
    ids = ids[max(0, len(ids) - room) :] + [tokenizer.eod]
    return ids + target, len(ids)
