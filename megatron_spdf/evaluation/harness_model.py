"""A model as EleutherAI's lm-eval asks for one. Importing this needs lm-eval.

Figures equal those of lm-eval's own model `hf` on the exported directory: texts begin with the
token that transformers puts before them with this tokenizer, if any (`Tokenizer.begin_token`), and
a text without context follows the token that is declared as the beginning (`Tokenizer.prefix`).
Where both hold, rolling log-likelihoods count that token after itself, as there. Special tokens
that a text spells out stay text.

Shapes: B prompts decoded together, T tokens of the longest prompt and what was decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.evaluation.token_likelihood import Labeled, token_likelihoods, windows_of
from megatron_spdf.resilience.world import Ranks
from megatron_spdf.text import counted

_NEW_TOKENS = 256  # of a completion, where the task does not say


class HarnessModel(TemplateLM):
    """A Hugging Face causal language model with a tokenizer of ours.

    Args:
        model: in memory, for inference.
        tokenizer: of the model.
        window: most tokens that it reads at once.
        batch_size: prompts decoded together.
        ranks: that share the requests, in a gloo group where there are several.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, window: int, batch_size: int,
                 ranks: Ranks):
        super().__init__()
        self._model, self._tokenizer = model, tokenizer
        self._window, self._batch_size = window, batch_size
        self._rank, self._world_size = ranks.rank, ranks.world
        self._device = torch.device("cpu")  # of what lm-eval gathers, over gloo

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.ends[-1]

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = self._tokenizer.encode(string)
        begins = self._tokenizer.begin_token is not None and add_special_tokens is not False
        return [self._tokenizer.bod, *ids] if begins else ids

    def loglikelihood_rolling(self, requests: list[Instance],
                              disable_tqdm: bool = False) -> list[float]:
        windows = [(number, window) for number, request in enumerate(requests)
                   for window in windows_of(self.tok_encode(request.args[0]), self.prefix_token_id,
                                            self._window)]
        totals = [0.0] * len(requests)
        found = self._likelihoods([window for _, window in windows], disable_tqdm)
        for (number, _), (nats, _) in zip(windows, found, strict=True):
            totals[number] += nats
        return totals

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]],
                              disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        for (_, text), _, continuation in requests:
            if len(continuation) > self._window:
                raise ValueError(f"the continuation {text[:60]!r} has "
                                 f"{counted(len(continuation), 'token')} and does not fit the "
                                 f"window of {self._window}")
        # what is too long loses its beginning
        sequences = [((context + continuation)[-self._window - 1 :], len(continuation))
                     for _, context, continuation in requests]
        return self._likelihoods([(ids, len(ids) - labels) for ids, labels in sequences],
                                 disable_tqdm)

    def _likelihoods(self, sequences: Sequence[Labeled],
                     quiet: bool) -> list[tuple[float, bool]]:
        """Log-likelihood of each sequence's labels, and whether all of them are the most likely."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
        with tqdm(total=len(sequences), unit="request", desc=f"rank 0 of {self._world_size}",
                  disable=quiet or self._rank > 0 or None) as bar:
            for batch, scores in token_likelihoods(self._model, sequences, self._tokenizer.eod):
                for number, (nats, greedy) in zip(batch, scores, strict=True):
                    found[number] = float(nats.double().sum()), bool(greedy.all())
                bar.update(len(batch))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        alike: dict[str, list[int]] = {}  # settings of decoding -> requests
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), unit="request", desc=f"rank 0 of {self._world_size}",
                  disable=disable_tqdm or self._rank > 0 or None) as bar:
            for numbers in alike.values():
                settings = requests[numbers[0]].args[1]
                prompts = {n: self.tok_encode(requests[n].args[0]) for n in numbers}
                numbers.sort(key=lambda n: -len(prompts[n]))
                for first in range(0, len(numbers), self._batch_size):
                    batch = numbers[first : first + self._batch_size]
                    found = self._complete([prompts[n] for n in batch], settings)
                    for number, text in zip(batch, found, strict=True):
                        texts[number] = text
                    bar.update(len(batch))
        return texts

    @torch.inference_mode()
    def _complete(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        """The texts that follow prompts, up to a stop string or the end of the document."""
        settings = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        eod, ends = self._tokenizer.eod, self._tokenizer.ends
        stops = handle_stop_sequences(settings.pop("until"), self._tokenizer.decode(ends[-1:]))
        new = settings.pop("max_gen_toks")
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        room = self._window - new
        if room < 1:
            raise ValueError(f"the task asks for {new} new tokens, which leaves no room for a "
                             f"prompt in the window of {self._window}; give a --window that has")
        prompts = [prompt[-room:] or [self.prefix_token_id] for prompt in prompts]
        longest = max(map(len, prompts))
        fillers = [[eod] * (longest - len(prompt)) for prompt in prompts]
        ids, mask = (torch.tensor(rows, device=self._model.device) for rows in (
            [filler + prompt for filler, prompt in zip(fillers, prompts, strict=True)],
            [[0] * len(filler) + [1] * len(prompt)
             for filler, prompt in zip(fillers, prompts, strict=True)]))  # (B, T)
        padding = list(range(self._tokenizer.vocab_size, self._model.config.vocab_size))
        config = GenerationConfig(max_new_tokens=new, eos_token_id=ends, pad_token_id=eod,
                                  bos_token_id=self.prefix_token_id,
                                  suppress_tokens=padding or None, **settings)
        found = self._model.generate(ids, attention_mask=mask, generation_config=config,
                                     stopping_criteria=StoppingCriteriaList(
                                         [_SaysOneOf(stops, self._tokenizer, longest)]))
        return [postprocess_generated_text(self._text(row), stops, None)
                for row in found[:, longest:].tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((n for n, token in enumerate(ids) if token in self._tokenizer.ends), len(ids))
        return self._tokenizer.decode(ids[:end])

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.zeros_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        parts = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, parts, dst)
        return parts

    def barrier(self) -> None:
        dist.barrier()


class _SaysOneOf(StoppingCriteria):
    """Ends a completion in which one of some strings has come up.

    Args:
        stops: the strings.
        tokenizer: of the model.
        begin: tokens of the prompt.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer, begin: int):
        self._stops, self._tokenizer, self._begin = [s for s in stops if s], tokenizer, begin
        # a stop string may begin or end inside a token, or inside a character
        self._tail = 8 + max((len(tokenizer.encode(stop)) for stop in self._stops), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **_) -> Tensor:
        """True if each of the sequences (B, T) is done, (B)."""
        said = [self._tokenizer.decode(row[-self._tail :])
                for row in input_ids[:, self._begin :].tolist()]
        return torch.tensor([any(stop in text for stop in self._stops) for text in said],
                            device=input_ids.device)
