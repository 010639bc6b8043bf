"""Labels that a model writes out: accuracy, F1 and Matthews correlation, the scores of GLUE (Wang
et al. 2019), equal to scikit-learn's.

An output is a label if it is the same text. Any other is wrong: of two labels it counts as the one
that is not right. How many there are is a figure of its own.

Shapes: N inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

from megatron_spdf.evaluation.metrics.metric import (
    METRICS,
    ByPart,
    Figure,
    Figures,
    Metric,
    Texts,
    by_part_of,
)
from megatron_spdf.evaluation.references import References

_SIGNATURE = "own, of the text that is written; what is no label is wrong"


def _of_labels(measure: Callable[[Texts, References], Figures]) -> Callable[..., ByPart]:
    """Applies a measure to each part of the test set, all of whose references are labels."""
    measured = by_part_of(measure)

    @wraps(measure)
    def checked(outputs: Texts, references: References) -> ByPart:
        require_labels(references)
        return measured(outputs, references)
    return checked


def require_labels(references: References) -> None:
    """Raises a ValueError where a reference is none of the labels."""
    if references.labels:
        strange = {text for texts in references.texts for text in texts} - {*references.labels}
        if strange:
            raise ValueError(f"the reference {min(strange)!r:.60} is none of the labels "
                             f"{', '.join(references.labels)}")


@_of_labels
def accuracy(outputs: Texts, references: References) -> Figures:
    """Share of outputs that are right, in [0, 1], and the number of those that are no label."""
    right = _right(outputs, references)
    figures = {"accuracy": Figure(sum(right) / len(right), _SIGNATURE)}
    if references.labels:
        strange = sum(output not in references.labels for output in outputs)
        figures["no_label"] = Figure(float(strange), "number of outputs that are no label")
    return figures


@_of_labels
def binary_f1(outputs: Texts, references: References) -> Figures:
    """F1 of the second label, in [0, 1]; 0 where nothing is of it."""
    true, false_positive, false_negative, _ = _confusion(outputs, references)
    total = 2 * true + false_positive + false_negative
    return {"F1": Figure(2 * true / total if total else 0.0, f"{_SIGNATURE}; of the second label")}


@_of_labels
def matthews(outputs: Texts, references: References) -> Figures:
    """Matthews correlation of two labels, in [-1, 1]; 0 where all are of one."""
    tp, fp, fn, tn = _confusion(outputs, references)
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    value = (tp * tn - fp * fn) / math.sqrt(square) if square else 0.0
    return {"matthews": Figure(value, _SIGNATURE)}


METRICS.register("accuracy", Metric(("accuracy", "no_label"), accuracy))
METRICS.register("binary_f1", Metric(("F1",), binary_f1))
METRICS.register("matthews", Metric(("matthews",), matthews))


def _right(outputs: Texts, references: References) -> list[bool]:
    """True if each output is one of its references, (N,)."""
    return [output in texts for output, texts in zip(outputs, references.texts, strict=True)]


def _confusion(outputs: Texts, references: References) -> tuple[int, int, int, int]:
    """Numbers of true positives, false positives, false negatives and true negatives, where the
    second of two labels is the positive one."""
    _, positive = references.labels
    pairs = [(texts[0] == positive, right) for texts, right
             in zip(references.texts, _right(outputs, references), strict=True)]
    return (pairs.count((True, True)), pairs.count((False, False)), pairs.count((True, False)),
            pairs.count((False, True)))
