"""ROUGE of summaries by Google's `rouge-score`, the F measures with Porter stemming."""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

KINDS = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean over the inputs of the best F1 over an input's references, in [0, 1]."""
    scorer = RougeScorer(list(KINDS.values()), use_stemmer=True)
    scores = [scorer.score_multi(texts, text) for text,
              texts in zip(predictions, references, strict=True)]
    return {name: sum(score[kind].fmeasure for score in scores) / len(scores) for name,
            kind in KINDS.items()}
