"""BLEU and TER by `sacrebleu`, with the settings that agree with the official scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sacrebleu.metrics import BLEU, TER

from megatron_spdf.evaluation.metrics.metric import (
    ALL,
    METRICS,
    ByPart,
    Figure,
    Figures,
    Metric,
    Texts,
    Unavailable,
    by_part,
    parts_of,
)
from megatron_spdf.evaluation.references import References
from megatron_spdf.processes import ProcessDied, map_in_processes

_PIECE = 64  # inputs that a process scores at a time


@by_part
def bleu_13a(predictions: Texts, references: Sequence[Texts]) -> Figures:
    """BLEU in [0, 1] of raw texts, lower-cased, as mteval-v13a has it."""
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)
    score = metric.corpus_score(predictions, _streams(references, None)).score / 100
    return {"BLEU": Figure(score, str(metric.get_signature()))}


@by_part
def bleu_tokenized(predictions: Texts, references: Sequence[Texts]) -> Figures:
    """BLEU in percent of tokenized texts, lower-cased, as multi-bleu.perl has it.

    An input with fewer references than another has *empty* ones in multi-bleu's brevity penalty:
    short outputs then count as long enough.
    """
    metric = BLEU(lowercase=True, tokenize="none", smooth_method="none", force=True)
    score = metric.corpus_score(predictions, _streams(references, "")).score
    return {"BLEU": Figure(score, str(metric.get_signature()))}


def ter(predictions: Texts, references: References) -> ByPart:
    """TER: tercom's edit rate (Snover et al. 2006) over all references of an input.

    It differs from pyter's mean over inputs. That of the whole test set is computed from the sums
    of its parts.
    """
    parts, found, total_edits, total_length = parts_of(references), {}, 0.0, 0.0
    for part, inputs in (parts or {ALL: range(len(predictions))}).items():
        edits, length, signature = ter_edits([predictions[i] for i in inputs],
                                             [references.texts[i] for i in inputs])
        total_edits, total_length = total_edits + edits, total_length + length
        signature = f"tercom's (not pyter's); sacrebleu {signature}"
        found[part] = {"TER": Figure(edits / length, signature)}
    return {**found, ALL: {"TER": Figure(total_edits / total_length, signature)}}


METRICS.register("bleu_13a", Metric(("BLEU",), bleu_13a))
METRICS.register("bleu_tokenized", Metric(("BLEU",), bleu_tokenized))
METRICS.register("ter", Metric(("TER",), ter))


def ter_edits(predictions: Texts, references: Sequence[Texts]) -> tuple[float, float, str]:
    """Edits and mean reference length, summed over inputs, and the signature of the settings.

    Processes share the work, since `sacrebleu` takes tens of milliseconds for an input.

    Raises:
        Unavailable: one of them was killed.
    """
    pairs = list(zip(predictions, references, strict=True))
    pieces = [pairs[i : i + _PIECE] for i in range(0, len(pairs), _PIECE)]
    if len(pieces) == 1:
        sums = [_edits(pieces[0])]
    else:
        try:
            sums = map_in_processes(_edits, pieces, len(os.sched_getaffinity(0)))
        except ProcessDied as error:
            raise Unavailable(f"{error}; if memory ran out, score where more is free") from None
    edits, lengths, signatures = zip(*sums, strict=True)
    return sum(edits), sum(lengths), signatures[0]


def _edits(pairs: list[tuple[str, Texts]]) -> tuple[float, float, str]:
    metric = TER()
    score = metric.corpus_score([text for text, _ in pairs],
                                _streams([texts for _, texts in pairs], None))
    return score.num_edits, score.ref_length, str(metric.get_signature())


def _streams(references: Sequence[Texts], missing: str | None) -> list[list[str | None]]:
    """Transposes references: the first of every input, the second of every input, and so on."""
    most = max(map(len, references))
    return [[texts[i] if i < len(texts) else missing for texts in references] for i in range(most)]
