"""Differences between cells of an experiment, seed by seed.

Runs of one seed see their data in the same order, so that much of what a seed does to a loss is in
both, and the difference is surer than the losses.
"""

from __future__ import annotations

from typing import Any

from megatron_spdf.runs.experiment import Experiment, summary
from megatron_spdf.tables import Column


def with_differences(experiment: Experiment, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `difference`, the mean over seeds of the loss less that of the baseline, and
    `difference_interval`, half the width of its 95% confidence interval (Student's t); both None
    for the baseline itself, or without seeds that both have.

    Args:
        rows: of `experiment.results`.
    """
    if experiment.baseline is None:
        return rows
    by_labels = {_key(experiment, row["labels"]): row for row in rows}
    return [{**row, **_difference(row, by_labels.get(
        _key(experiment, row["labels"] | experiment.baseline)))} for row in rows]


def _key(experiment: Experiment, labels: dict[str, str]) -> tuple[str, ...]:
    return tuple(labels[axis] for axis in experiment.axes)


def _difference(row: dict[str, Any], other: dict[str, Any] | None) -> dict[str, float | None]:
    seeds = [] if other is None or other is row else row["losses"].keys() & other["losses"].keys()
    center, interval = summary([row["losses"][seed] - other["losses"][seed] for seed in seeds])
    return {"difference": center, "difference_interval": interval}


def difference_column(experiment: Experiment) -> list[Column]:
    """The column of the differences; none without a baseline."""
    if experiment.baseline is None:
        return []
    return [Column(f"less that of {', '.join(experiment.baseline.values())}", _render,
                   align="right")]


def _render(row: dict[str, Any]) -> str | None:
    if row.get("difference") is None:
        return None
    interval = row["difference_interval"]
    return f"{row['difference']:+.4f}" + ("" if interval is None else f" ± {interval:.4f}")
