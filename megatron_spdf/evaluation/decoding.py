"""Decoding of prompts by the beam search of `transformers`, and the perplexity of completions.

A prompt is the context and the end-of-document token (EOD), as in fine-tuning. The model continues
with " " + completion, and ends with another EOD or at a blank line (Hu et al. 2022, the NLG
examples of LoRA). Several ranks share the prompts.

Rows of the vocabulary that no id of the tokenizer has are never decoded. They keep their share of
the softmax, as in transformers, so they do count in perplexity.

Shapes: B prompts or pairs read together, T tokens of the longest, N completion tokens of them, K
hypotheses of the search over a batch, V vocabulary.
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

from megatron_spdf.data.finetuning.task import Loses, shortened
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.evaluation.token_likelihood import BATCH_TOKENS, label_states


@dataclass(frozen=True)
class DecodingSettings:
    """Options of decoding. The defaults are LoRA's for E2E, which SPDF follows.

    Attributes:
        beams: width of the beam; 1 is greedy.
        length_penalty: power of a hypothesis's length by which its log-probability is divided.
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
    """Completions of one rank.

    Attributes:
        texts: index of the prompt -> completion, outer blanks removed.
        tokens: number of tokens of all completions, the end included.
        seconds: duration of decoding.
        truncated: number of prompts that lost a part of their context.
    """

    texts: dict[int, str]
    tokens: int
    seconds: float
    truncated: int


class _NoRepeatInCompletion(NoRepeatNGramLogitsProcessor):
    """Bans repeated n-grams of the completion. The processor of `transformers` bans the prompt's as
    well."""

    def __init__(self, size: int, prompt_length: int):
        super().__init__(size)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (K, V) of the next token after input_ids (K, T), with banned tokens at -inf."""
        return super().__call__(input_ids[:, self._prompt_length :], scores)


def window_of(model: PreTrainedModel) -> int:
    """Number of tokens that the model can read at once."""
    return model.config.max_position_embeddings


def room_for_prompts(window: int, settings: DecodingSettings) -> int:
    """Number of context tokens that a window has room for, besides end of document and completion.

    Raises:
        ValueError: there is none.
    """
    room = window - settings.max_new_tokens - 1
    if room < 1:
        raise ValueError(f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in "
                         f"the window of {window} tokens; give at most {window - 2}")
    return room


def decode(model: PreTrainedModel, tokenizer: Tokenizer, contexts: Sequence[str],
           settings: DecodingSettings, rank: int = 0, world: int = 1,
           loses: Loses = "beginning") -> Decoded:
    """Decodes this rank's share of the prompts, those of like length together.

    A prompt that leaves no room for `max_new_tokens` loses one end of its context.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: of the model.
        contexts: one for each prompt.
        settings: of the search.
        rank, world: of this process, and their number.
        loses: end of a context that is cut off.

    Raises:
        ValueError: the window has no room for so many new tokens.
    """
    room = room_for_prompts(window_of(model), settings)
    encoded = [tokenizer.encode(context) for context in contexts]
    prompts = [shortened(ids, room, loses) + [tokenizer.eod] for ids in encoded]
    share = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))[rank::world]
    texts, tokens, start = {}, 0, time.monotonic()
    with tqdm(total=len(share), unit="input", desc=f"decode, rank 0 of {world}",
              disable=rank > 0 or None) as bar:
        for first in range(0, len(share), settings.batch_size):
            chosen = share[first : first + settings.batch_size]
            completions = _complete(model, tokenizer, [prompts[i] for i in chosen], settings)
            texts |= {i: tokenizer.decode(ids).strip()
                      for i, ids in zip(chosen, completions, strict=True)}
            tokens += sum(len(ids) + 1 for ids in completions)
            bar.update(len(chosen))
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    truncated = sum(len(encoded[i]) > room for i in share)
    return Decoded(texts, tokens, time.monotonic() - start, truncated)


@torch.inference_mode()
def _complete(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]],
              s: DecodingSettings) -> list[list[int]]:
    """Token ids of the best completion of each prompt, without the end token."""
    longest = max(map(len, prompts))
    # ids, mask: (B, T), padded on the left, so that all completions begin at one position
    ids = torch.tensor([[tokenizer.eod] * (longest - len(p)) + p for p in prompts],
                       device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
                        device=model.device)
    ends = completion_ends(tokenizer)
    config = GenerationConfig(
        num_beams=s.beams, length_penalty=s.length_penalty if s.beams > 1 else None,
        max_new_tokens=s.max_new_tokens, do_sample=False, eos_token_id=ends,
        pad_token_id=tokenizer.eod, bos_token_id=tokenizer.eod,
        suppress_tokens=list(range(tokenizer.vocab_size, model.config.vocab_size)) or None)
    processors = LogitsProcessorList()
    if s.no_repeat_ngram:
        processors.append(_NoRepeatInCompletion(s.no_repeat_ngram, longest))
    out = model.generate(ids, attention_mask=mask, generation_config=config,
                         logits_processor=processors)
    return [_until(row, set(ends)) for row in out[:, longest:].tolist()]


def completion_ends(tokenizer: Tokenizer) -> list[int]:
    """End tokens: EOD, and the blank line where that is one token (628 in GPT-2's vocabulary)."""
    blank = tokenizer.encode("\n\n")
    return [tokenizer.eod, *(blank if len(blank) == 1 else [])]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Ids before the first end token."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of one rank's share of the completions given their contexts.

    Attributes:
        nats: negative log-likelihood, summed over the tokens.
        tokens: number of completion tokens, EODs included.
        left_out: number of completions, over all ranks, that alone do not fit the window.
    """

    nats: float
    tokens: int
    left_out: int = 0


@torch.inference_mode()
def likelihood(model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]],
               rank: int = 0, world: int = 1, batch_tokens: int = BATCH_TOKENS,
               loses: Loses = "beginning") -> Likelihood:
    """Computes the log-likelihood of this rank's share of the completions.

    The perplexity is exp(nats / tokens), both summed over all ranks.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: of the model.
        pairs: (context, completion); a pair longer than the window loses one end of its context,
            and one whose completion alone is longer is left out.
        rank, world: of this process, and their number.
        batch_tokens: most tokens, padding included, that are read at once.
        loses: end of a context that is cut off.
    """
    window = window_of(model)
    sequences = [_sequence(tokenizer, context, completion, window, loses)
                 for context, completion in pairs]
    fitting = [sequence for sequence in sequences if sequence]
    share = sorted(fitting, key=lambda s: -len(s[0]))[rank::world]
    nats, tokens = 0.0, 0
    with tqdm(total=len(share), unit="pair", desc=f"perplexity, rank 0 of {world}",
              disable=rank > 0 or None) as bar:
        for batch, hidden, labels in label_states(model, share, tokenizer.eod, batch_tokens):
            logits = model.get_output_embeddings()(hidden).float()  # (N, V)
            nats += float(cross_entropy(logits, labels, reduction="sum"))
            tokens += len(labels)
            bar.update(len(batch))
    return Likelihood(nats, tokens, len(sequences) - len(fitting))


def _sequence(tokenizer: Tokenizer, context: str, completion: str, window: int,
              loses: Loses) -> tuple[list[int], int] | None:
    """Token ids of context + EOD + " " + completion + EOD, and the index at which the completion
    begins; None: the completion does not fit together with the token that precedes it.

    The window holds all but the last token, which is a label only.
    """
    target = [*tokenizer.encode(f" {completion}"), tokenizer.eod]
    room = window - len(target)
    if room < 0:
        return None
    ids = shortened(tokenizer.encode(context), room, loses) + [tokenizer.eod]
    return ids + target, len(ids)
