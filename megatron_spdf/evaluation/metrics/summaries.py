"""ROUGE of summaries by Google's `rouge-score`, the F measures with Porter stemming."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer

from megatron_spdf.evaluation.metrics.metric import METRICS, Figure, Figures, Metric, by_part

KINDS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
_SIGNATURE = f"F1, stemmed, best of the references, mean; rouge-score {version('rouge-score')}"


@by_part
def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """Mean over the inputs of the best F1 over an input's references, in [0, 1]."""
    scorer = RougeScorer(list(KINDS.values()), use_stemmer=True)
    scores = [scorer.score_multi(texts, text)
              for text, texts in zip(predictions, references, strict=True)]
    means = {name: sum(score[kind].fmeasure for score in scores) / len(scores)
             for name, kind in KINDS.items()}
    return {name: Figure(mean, _SIGNATURE) for name, mean in means.items()}


@by_part
def rouge_lsum(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """ROUGE-L over the sentences of a summary, in [0, 1], which CNN/DailyMail's ROUGE-L is.

    Sentences end at " . ", as in T5's scores (Raffel et al. 2020).
    """
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    best = [scorer.score_multi([_in_sentences(text) for text in texts], _in_sentences(said))
            for said, texts in zip(predictions, references, strict=True)]
    mean = sum(score["rougeLsum"].fmeasure for score in best) / len(best)
    return {"ROUGE-Lsum": Figure(mean, f"{_SIGNATURE}; sentences end at ' . '")}


METRICS.register("rouge", Metric(tuple(KINDS), rouge))
METRICS.register("rouge_lsum", Metric(("ROUGE-Lsum",), rouge_lsum))


def _in_sentences(text: str) -> str:
    return text.replace(" . ", " .\n")
