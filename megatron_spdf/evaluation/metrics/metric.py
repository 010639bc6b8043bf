"""Registry of metrics. A task names those that score it; a metric is one file of this room, which
registers itself in METRICS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps

from megatron_spdf.evaluation.references import References
from megatron_spdf.registry import Registry

ALL = "all"
Texts = Sequence[str]


@dataclass(frozen=True)
class Figure:
    """Figure of a metric.

    Attributes:
        value: in the unit of the official script.
        signature: implementation and settings behind the value.
    """

    value: float
    signature: str


Figures = dict[str, Figure]
ByPart = dict[str, Figures]


class Unavailable(Exception):
    """Raised if this machine cannot compute a metric. The message says why."""


@dataclass(frozen=True)
class Metric:
    """Metric that scores outputs.

    Attributes:
        figures: names of its figures.
        measure: (outputs, references) -> part of the test set -> name -> figure. Raises Unavailable
            if the machine lacks a program.
    """

    figures: tuple[str, ...]
    measure: Callable[[Texts, References], ByPart]


METRICS: Registry[Metric] = Registry("metric", "megatron_spdf.evaluation.metrics")


def parts_of(references: References) -> dict[str, list[int]]:
    """Part of the test set -> indices of its inputs, in alphabetical order. Empty if there is one
    part."""
    groups = references.groups
    found = {part: [i for i, group in enumerate(groups) if group == part]
             for part in sorted(set(groups))}
    return found if len(found) > 1 else {}


def by_part_of(measure: Callable[[Texts, References], Figures]) -> Callable[..., ByPart]:
    """Applies a measure to each part of the test set, and to all of it."""
    @wraps(measure)
    def measured(outputs: Texts, references: References) -> ByPart:
        parts = {**parts_of(references), ALL: range(len(outputs))}
        return {part: measure([outputs[i] for i in inputs], references.of(inputs))
                for part, inputs in parts.items()}
    return measured


def by_part(measure: Callable[[Texts, Sequence[Texts]], Figures]) -> Callable[..., ByPart]:
    """As `by_part_of`, of a measure that takes the texts of the references alone."""
    return by_part_of(wraps(measure)(
        lambda outputs, references: measure(outputs, references.texts)))
