"""BLEU and TER by `sacrebleu`, with the settings that agree with the official scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from sacrebleu.metrics import BLEU, TER

Texts = Sequence[str]
_PIECE = 64  # inputs that a process scores at a time


def bleu_raw(predictions: Texts, references: Sequence[Texts]) -> tuple[float, str]:
    """BLEU in [0, 1] of raw texts, lower-cased, as mteval-v13a has it; and the signature of its
    settings."""
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)
    score = metric.corpus_score(predictions, _streams(references, None)).score / 100
    return score, str(metric.get_signature())


def bleu_tokenized(predictions: Texts, references: Sequence[Texts]) -> tuple[float, str]:
    """BLEU in percent of tokenized texts, lower-cased, as multi-bleu.perl has it; and the signature
    of its settings.

    An input with fewer references than another has *empty* ones in multi-bleu's brevity penalty:
    short outputs then count as long enough.
    """
    metric = BLEU(lowercase=True, tokenize="none", smooth_method="none", force=True)
    score = metric.corpus_score(predictions, _streams(references, "")).score
    return score, str(metric.get_signature())


def ter_edits(predictions: Texts, references: Sequence[Texts]) -> tuple[float, float, str]:
    """Edits, mean reference length, summed over inputs; their ratio is TER. And the signature of
    the settings.

    tercom's edit rate (Snover et al., 2006) over all references of an input; another than pyter's
    mean over inputs. The work is shared among the processors, since `sacrebleu` takes tens of
    milliseconds for an input.
    """
    pairs = list(zip(predictions, references, strict=True))
    pieces = [pairs[i : i + _PIECE] for i in range(0, len(pairs), _PIECE)]
    if len(pieces) == 1:
        sums = [_edits(pieces[0])]
    else:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            sums = list(pool.map(_edits, pieces))
    edits, lengths, signatures = zip(*sums, strict=True)
    return sum(edits), sum(lengths), signatures[0]


def _edits(pairs: list[tuple[str, Texts]]) -> tuple[float, float, str]:
    metric = TER()
    score = metric.corpus_score([text for text, _ in pairs],
                                _streams([texts for _, texts in pairs], None))
    return score.num_edits, score.ref_length, str(metric.get_signature())


def _streams(references: Sequence[Texts], missing: str | None) -> list[list[str | None]]:
    """The first reference of every input, the second, ..."""
    most = max(map(len, references))
    return [[texts[i] if i < len(texts) else missing for texts in references] for i in range(most)]
