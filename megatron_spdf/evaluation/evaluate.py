"""Evaluates a checkpoint on a task: perplexity of the references, decoding and scores, on one rank
or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_spdf.convert.huggingface_export import in_memory
from megatron_spdf.convert.source import WeightSource, tokenizer_of
from megatron_spdf.data.finetuning.task import TASKS, Example, training_pairs
from megatron_spdf.data.tokenizers.base import render_padding
from megatron_spdf.evaluation.decoding import (
    Decoded,
    DecodingSettings,
    Likelihood,
    decode,
    likelihood,
    room_for_prompts,
)
from megatron_spdf.evaluation.metrics.metric import ALL
from megatron_spdf.evaluation.perplexity import perplexity
from megatron_spdf.evaluation.references import references_of
from megatron_spdf.evaluation.scores import NO_REFERENCE, Scores, metrics_of, score
from megatron_spdf.parallel.ranks import init_gloo
from megatron_spdf.resilience.world import Ranks


@dataclass(frozen=True)
class Evaluated:
    """What a checkpoint made of a test set.

    Attributes:
        predictions: one for each input.
        likelihood: of all references.
        padding: sentence on rows of the vocabulary without a token; empty: there are none.
        facts: about the decoding.
    """

    predictions: list[str]
    likelihood: Likelihood
    padding: str
    facts: dict[str, Any]


def evaluate(source: WeightSource, task: str, examples: Sequence[Example],
             settings: DecodingSettings, ranks: Ranks) -> Evaluated | None:
    """Decodes on all ranks, and computes the likelihood of the references.

    Args:
        source: weights and tokenizer.
        task: name of the task.
        examples: of the split.
        settings: of decoding.
        ranks: of this job.

    Returns:
        On rank 0 what came out; None on the others.

    Raises:
        ValueError: a metric of the task is unknown, or no prompt fits the model's window beside so
            many new tokens.
    """
    metrics_of(task)
    room_for_prompts(source.model.max_positions, settings)
    tokenizer = tokenizer_of(source)
    device = init_gloo(ranks)
    try:
        model = in_memory(source).to(device)
        pairs = training_pairs(examples)
        loses = TASKS.get(task).loses
        measured = likelihood(model, tokenizer, pairs, ranks.rank, ranks.world, loses=loses)
        decoded = decode(model, tokenizer, [e.context for e in examples], settings,
                         ranks.rank, ranks.world, loses)
        shares = _gather(ranks, (measured, decoded))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if ranks.rank > 0:
        return None
    return _joined(shares, settings, device, render_padding(tokenizer, source.model.vocab_size))


def _gather(ranks: Ranks, share: Any) -> list[Any]:
    if ranks.world == 1:
        return [share]
    shares: list[Any] = [None] * ranks.world
    dist.gather_object(share, shares if ranks.rank == 0 else None)
    return shares


def _joined(shares: list[tuple[Likelihood, Decoded]], settings: DecodingSettings,
            device: torch.device, padding: str) -> Evaluated:
    texts = {i: text for _, decoded in shares for i, text in decoded.texts.items()}
    nats, tokens = (sum(getattr(measured, name) for measured, _ in shares)
                    for name in ("nats", "tokens"))
    seconds = max(decoded.seconds for _, decoded in shares)
    generated = sum(decoded.tokens for _, decoded in shares)
    facts = {**asdict(settings), "inputs": len(texts), "ranks": len(shares),
             "device": _name(device),
             "tokens": generated, "seconds": round(seconds, 1),
             "tokens_per_second": round(generated / seconds, 1),
             "truncated_prompts": sum(decoded.truncated for _, decoded in shares)}
    measured = Likelihood(nats, tokens, shares[0][0].left_out)
    return Evaluated([texts[i] for i in range(len(texts))], measured, padding, facts)


def scores_of(task: str, examples: Sequence[Example], evaluated: Evaluated) -> Scores:
    """Scores of the predictions, and the perplexity of the references."""
    scores = score(task, evaluated.predictions, references_of(examples))
    measured = evaluated.likelihood
    if not measured.tokens:
        scores.missing["perplexity"] = ("no reference fits the window" if measured.left_out
                                        else NO_REFERENCE)
        return scores
    loss = measured.nats / measured.tokens
    scores.values[ALL]["perplexity"] = perplexity(loss)
    scores.signatures["perplexity"] = (
        f"of the references' {measured.tokens:,} tokens after context and end of document, in fp32"
        + (f"; {measured.left_out:,} references that alone do not fit the window are left out"
           if measured.left_out else "")
        + (f"; {evaluated.padding}, but they are part of the softmax" if evaluated.padding else ""))
    if scores.values[ALL]["perplexity"] is None:
        scores.missing["perplexity"] = (f"the loss is {loss:.4g} nats per token, whose exponential "
                                        "is no number: the model has diverged")
    return scores


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
