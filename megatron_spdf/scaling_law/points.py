"""Finished trainings, to which laws are fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spdf.tables import Column, Table

DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """Finished training.

    Attributes:
        sparsity: at the end.
        nonzero: linear weights that are not zero at the end.
        data: tokens.
        loss: in nats; NaN: not measured yet, as it may be where it is predicted.
        average: non-zero linear weights on average over the tokens; default: `nonzero`.
        algorithm: of its masks.
        cell: runs that share it are correlated, and resampled together; empty: it is on its own.
    """

    sparsity: float
    nonzero: float
    data: float
    loss: float
    name: str = ""
    average: float | None = None
    algorithm: str = "static"
    cell: str = ""

    @property
    def mean_nonzero(self) -> float:
        return self.nonzero if self.average is None else self.average

    @property
    def group(self) -> str:
        """Algorithm and sparsity, in words."""
        return DENSE if self.sparsity == 0.0 else f"{self.algorithm} {self.sparsity:.4g}"


def check_points(points: Sequence[Point], predicted: bool = False) -> None:
    """Raises a ValueError for values that no law has.

    Args:
        predicted: no law is fitted to them, so that the loss need not be known.
    """
    for point in points:
        unknown = predicted and math.isnan(point.loss)
        values = (point.nonzero, point.mean_nonzero, point.data, *([] if unknown else [point.loss]))
        if not (all(math.isfinite(v) and v > 0.0 for v in values) and 0.0 <= point.sparsity < 1.0):
            raise ValueError(f"the run {point.name} has sparsity {point.sparsity:g}, "
                             f"{point.nonzero:g} non-zero weights, {point.data:g} tokens and loss "
                             f"{point.loss:g}; a law is of positive numbers, leave it out")


def render_points(points: Sequence[Point]) -> str:
    """Formats the runs as the law sees them."""
    return Table([Column("run", "name"), Column("sparsity", form=".2%"),
                  Column("non-zero weights", "nonzero", ",.0f"),
                  Column("on average", "mean_nonzero", ",.0f"), Column("tokens", "data", ".4g"),
                  Column("loss", form=".4f")], points).text("  ")
