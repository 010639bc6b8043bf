"""Scores of a task, equal to the figures that its official scripts print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_spdf.data.finetuning.task import TASKS
from megatron_spdf.evaluation.metrics.metric import ALL, METRICS, ByPart, Metric, Unavailable
from megatron_spdf.evaluation.references import References, in_official_form
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import counted, first_line

NO_REFERENCE = "no input has a reference"


@dataclass
class Scores:
    """Scores, with the implementations behind them, and metrics that could not be computed.

    Attributes:
        values: part of the test set -> metric -> score. "all" is always there; WebNLG's data also
            have "seen" and "unseen".
        signatures: metric -> implementation and settings behind its values.
        missing: metric -> reason why it has no value.
        left_out: inputs without a reference, on which nothing is scored.
    """

    values: dict[str, dict[str, float]] = field(default_factory=lambda: {ALL: {}})
    signatures: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    left_out: int = 0


def metrics_of(task: str) -> list[Metric]:
    """Looks up the metrics that a task names.

    Raises:
        ValueError: the task or a metric is unknown.
    """
    return [METRICS.get(name) for name in TASKS.get(task).metrics]


def score(task: str, predictions: Sequence[str], references: References) -> Scores:
    """Scores predictions in the task's official form.

    Args:
        task: name of the task.
        predictions: one for each input.
        references: of the same inputs, in the same order.

    Raises:
        ValueError: predictions and references are of different counts, or there are none.
    """
    if len(predictions) != len(references.texts) or not predictions:
        raise ValueError(f"{counted(len(predictions), 'prediction')} for "
                         f"{counted(len(references.texts), 'input')} with references; there must "
                         "be one prediction for each, one per line, in the order of the references")
    kept = [i for i, texts in enumerate(references.texts) if texts]
    scores = Scores(left_out=len(predictions) - len(kept))
    outputs, official = in_official_form(TASKS.get(task), [predictions[i] for i in kept],
                                         references.of(kept))
    official = replace(official, labels=TASKS.get(task).labels)
    for metric in metrics_of(task):
        if not kept:
            scores.missing |= dict.fromkeys(metric.figures, NO_REFERENCE)
            continue
        try:
            _add(scores, metric.measure(outputs, official))
        except Unavailable as error:
            scores.missing |= dict.fromkeys(metric.figures, str(error))
        except Exception as error:  # of a library, on texts of others: the other scores are sound
            scores.missing |= dict.fromkeys(
                metric.figures, f"{type(error).__name__}: {first_line(error)}")
    return scores


def _add(scores: Scores, found: ByPart) -> None:
    for part, figures in found.items():
        for name, figure in figures.items():
            scores.signatures[name] = figure.signature
            if math.isfinite(figure.value):
                scores.values.setdefault(part, {})[name] = figure.value
            else:
                scores.missing[name] = f"it is {figure.value} on the part {part!r}"


def render(scores: Scores) -> str:
    """A row for each metric and a column for each part of the test set, then what is behind the
    figures."""
    parts = [ALL, *sorted(scores.values.keys() - {ALL})]
    names = list(dict.fromkeys(name for part in parts for name in scores.values[part]))
    columns = [Column("metric", str),
               *(Column(part, _short(scores.values[part]), ".6f") for part in parts)]
    missing = [f"{name}: missing ({why})" for name, why in scores.missing.items()]
    if scores.left_out:
        missing.append(f"{counted(scores.left_out, 'input')} without a reference, not scored")
    behind = [f"  {name}: {signature}" for name, signature in scores.signatures.items()]
    return "\n".join([Table(columns, names).text(), *missing, *behind])


def _short(values: dict[str, float]) -> Callable[[str], float | str | None]:
    """Value of a metric, or its text where that has fewer digits, as of a model's that has all but
    diverged."""
    def value(name: str) -> float | str | None:
        found = values.get(name)
        return f"{found:.6e}" if found is not None and abs(found) >= 1e12 else found
    return value
