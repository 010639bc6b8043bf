"""Perplexity of text files, as they are.

Every document begins after the token that begins documents, or ends them where none does; every
token of its text is predicted once. Documents longer than the window are cut, and each part follows
the token before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel

from megatron_spdf.convert.huggingface_export import in_memory
from megatron_spdf.convert.source import WeightSource, tokenizer_of
from megatron_spdf.data.preprocess.documents import ReadReport, iterate_documents
from megatron_spdf.data.tokenizers.base import well_formed
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.evaluation.metrics.metric import ALL
from megatron_spdf.evaluation.perplexity import bits_per_byte, perplexity
from megatron_spdf.evaluation.scores import Scores
from megatron_spdf.evaluation.token_likelihood import token_likelihoods, windows_of
from megatron_spdf.parallel.ranks import init_gloo
from megatron_spdf.resilience.world import Ranks

WINDOW = 2048  # tokens that are read at once, where nobody says and the model can
_TOGETHER = 2**17  # characters of text that are cut into windows before they are read


@dataclass(frozen=True)
class TextLikelihood:
    """Log-likelihood of texts.

    Attributes:
        nats: negative log-likelihood, summed over the tokens.
        tokens, bytes: of the texts, in UTF-8.
        documents: number of texts.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def __add__(self, other: TextLikelihood) -> TextLikelihood:
        return TextLikelihood(self.nats + other.nats, self.tokens + other.tokens,
                              self.bytes + other.bytes, self.documents + other.documents)


@dataclass(frozen=True)
class Texts:
    """Documents of files.

    Attributes:
        paths: as of `data.preprocess.documents.iterate_documents`.
        key: of the text in a record.
        on_error: "stop" or "skip", at a record that cannot be read.
    """

    paths: Sequence[Path]
    key: str = "text"
    on_error: str = "stop"

    def read(self, report: ReadReport | None = None) -> Iterator[str]:
        """Draws the texts, in order.

        Raises:
            ValueError: a file cannot be read or is of no known format, a record is bad, or there
                is no document.
        """
        return (document.text for document in iterate_documents(self.paths, self.key,
                                                                self.on_error, report))

    def check(self) -> int:
        """Reads everything, as `read`, and counts the records that are skipped."""
        report = ReadReport()
        for _ in self.read(report):
            pass
        return report.skipped


def evaluate_text(source: WeightSource, texts: Texts, window: int,
                  ranks: Ranks) -> TextLikelihood | None:
    """Log-likelihood of the documents of files, which ranks share.

    Args:
        source: weights and tokenizer.
        texts: to be read.
        window: most tokens that the model reads at once.
        ranks: of this job.

    Returns:
        The sum over all ranks on rank 0, None on the others.
    """
    tokenizer = tokenizer_of(source)
    device = init_gloo(ranks)
    try:
        model = in_memory(source).to(device)
        share = (text for number, text in enumerate(texts.read())
                 if number % ranks.world == ranks.rank)
        with tqdm(unit="document", desc=f"text, rank 0 of {ranks.world}",
                  disable=ranks.rank > 0 or None) as bar:
            found = TextLikelihood()
            for together in _together(share):
                found += likelihood_of(model, tokenizer, together, window)
                bar.update(len(together))
        shares = [found]
        if ranks.world > 1:
            shares = [found] * ranks.world
            dist.gather_object(found, shares if ranks.rank == 0 else None)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return sum(shares, TextLikelihood()) if ranks.rank == 0 else None


def likelihood_of(model: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str],
                  window: int) -> TextLikelihood:
    """Log-likelihood of texts.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: of the model.
        texts: documents.
        window: most tokens that the model reads at once.
    """
    encoded = tokenizer.encode_batch(texts)
    windows = [w for ids in encoded for w in windows_of(ids, tokenizer.bod, window)]
    nats = -sum(float(scores[0].double().sum())
                for _, found in token_likelihoods(model, windows, tokenizer.eod)
                for scores in found)
    return TextLikelihood(nats, sum(map(len, encoded)),
                          sum(len(well_formed(text).encode()) for text in texts), len(texts))


def _together(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts in lists of about `_TOGETHER` characters."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= _TOGETHER:
            yield held
            held, size = [], 0
    if held:
        yield held


def text_scores(found: TextLikelihood, window: int, begin: str) -> Scores:
    """Perplexity, and what compares across tokenizers.

    Args:
        found: of all ranks.
        window: that the model read.
        begin: token that documents begin after.

    Raises:
        ValueError: the texts have no tokens.
    """
    if not found.tokens:
        raise ValueError("the texts have no token; give text that has some")
    loss = found.nats / found.tokens
    scores = Scores()
    figures = {"perplexity": perplexity(loss),
               "bits_per_byte": bits_per_byte(loss, found.tokens / found.bytes)}
    said = (f"of the {found.tokens:,} tokens, {found.bytes:,} bytes, of {found.documents:,} "
            f"documents, each after {begin!r}, {window:,} tokens read at once, in fp32")
    for name, value in figures.items():
        if value is not None and math.isfinite(value):
            scores.values[ALL][name], scores.signatures[name] = value, said
        else:
            scores.missing[name] = (f"the loss is {loss:.4g} nats per token: the model has "
                                    "diverged")
    return scores
