"""Exact match and F1 of short answers, as the official evaluate-v1.1.py of SQuAD (Rajpurkar et al.
2016) computes them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_spdf.evaluation.metrics.metric import METRICS, Figure, Figures, Metric, Texts, by_part

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's alone
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGNATURE = "own, normalized as in SQuAD's evaluate-v1.1.py, best of the references, mean, percent"


def normalized(answer: str) -> str:
    """An answer in lower case without ASCII punctuation, articles and surplus blanks."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


@by_part
def squad(outputs: Texts, references: Sequence[Texts]) -> Figures:
    """Means over the inputs of the best exact match and the best F1 over an input's references, in
    percent."""
    return {"exact_match": Figure(_mean(_same, outputs, references), _SIGNATURE),
            "F1": Figure(_mean(_overlap, outputs, references), _SIGNATURE)}


METRICS.register("squad", Metric(("exact_match", "F1"), squad))


def _mean(measure: Callable[[str, str], float], outputs: Texts,
          references: Sequence[Texts]) -> float:
    best = [max(measure(normalized(output), normalized(text)) for text in texts)
            for output, texts in zip(outputs, references, strict=True)]
    return 100.0 * sum(best) / len(best)


def _same(output: str, reference: str) -> float:
    return float(output == reference)


def _overlap(output: str, reference: str) -> float:
    """F1 of the words that both have; 0 where none is left of either, even if both are the same."""
    said, wanted = output.split(), reference.split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2.0 * shared / (len(said) + len(wanted)) if shared else 0.0
