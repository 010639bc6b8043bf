"""Metrics by name. A task names those it is scored with; each is one file of this room, which
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
    """A figure of a metric.

    Attributes:
        signature: the implementation and settings behind the value.
    """

    value: float
    signature: str


Figures = dict[str, Figure]
ByPart = dict[str, Figures]


class Unavailable(Exception):
    """A metric cannot be computed on this machine; the message says why."""


@dataclass(frozen=True)
class Metric:
    """A way to score outputs.

    Attributes:
        figures: names of what it gives.
        measure: outputs and their references -> part of the test set -> name -> figure. Raises
            Unavailable where the machine lacks something.
    """

    figures: tuple[str, ...]
    measure: Callable[[Texts, References], ByPart]


METRICS: Registry[Metric] = Registry("metric", "megatron_spdf.evaluation.metrics")


def parts_of(references: References) -> dict[str, list[int]]:
    """Part of the test set -> its inputs, in alphabetical order; none where there is one part."""
    groups = references.groups
    found = {part: [i for i, group in enumerate(groups) if group == part]
             for part in sorted(set(groups))}
    return found if len(found) > 1 else {}


def by_part(measure: Callable[[Texts, Sequence[Texts]], Figures]) -> Callable[..., ByPart]:
    """Measures each part of the test set by itself, and all of it."""
    @wraps(measure)
    def measured(outputs: Texts, references: References) -> ByPart:
        found = {part: measure([outputs[i] for i in inputs], [references.texts[i] for i in inputs])
                 for part, inputs in parts_of(references).items()}
        return {**found, ALL: measure(outputs, references.texts)}
    return measured
