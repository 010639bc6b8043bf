"""What a grid says of the scaling law, as Markdown: how much of the grid there is, equivalent dense
sizes beside the published ones, coefficients, held-out cells, and losses of one mask less those of
another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from megatron_spdf.runs.experiment import Cell, Plot, summary
from megatron_spdf.runs.held_out import PredictionRow, labels_of
from megatron_spdf.runs.loss_table import LossRow
from megatron_spdf.scaling_law.law import PUBLISHED
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import counted

GMP = PUBLISHED["t5"]
BRACKETS = "In brackets the 5% and the 95% quantile over bootstrap samples of models and seeds."
Fit = Mapping[str, Any]  # `Fit.as_plain`, with `runs`


def progress_table(cells: Sequence[Cell], rows: Sequence[LossRow], plot: Plot) -> str:
    """Runs that are done and fitted or predicted, by masks and size."""
    lines, panel = str(plot.lines), plot.panels[0]
    sizes = list(dict.fromkeys(cell.labels[panel] for cell in cells))

    def count(mask: str, size: str) -> str:
        planned = sum(len(cell.trials) for cell in cells
                      if (cell.labels[lines], cell.labels[panel]) == (mask, size))
        done = sum((row.labels[lines], row.labels[panel]) == (mask, size) for row in rows)
        return f"{done} of {planned}"

    masks = dict.fromkeys(cell.labels[lines] for cell in cells)
    columns = [Column(lines, "mask"),
               *(Column(size, lambda row, size=size: count(row["mask"], size), align="right")
                 for size in sizes)]
    planned = sum(len(cell.trials) for cell in cells)
    return (f"{Table(columns, [{'mask': mask} for mask in masks]).markdown()}\n\n"
            f"{len(rows):,} of {counted(planned, 'run')}, of seed "
            f"{', '.join(map(str, sorted({row.seed for row in rows})))}.")


def gains_table(fits: Sequence[Fit]) -> str:
    """Dense size with the loss of a sparse model at the same tokens, over its active weights."""
    by_form = {fit["form"]: fit["gains"] for fit in fits}
    groups = by_form.get("groups", {})
    keys = groups or {f"static {float(key):.4g}": gain
                      for key, gain in by_form.get("published", {}).items()}
    curve = {f"static {float(key):.4g}": gain
             for key, gain in by_form.get("published", {}).items()}
    rows = [{"masks": key, "sparsity": float(key.split()[-1])} for key in keys]
    rows.sort(key=lambda row: (row["masks"].split()[0] != "static", row["sparsity"]))
    columns = [Column("masks", lambda row: f"{row['masks'].split()[0]} {row['sparsity']:.1%}"),
               Column("a factor for each", lambda row: _quantiles(groups.get(row["masks"]))),
               Column("published form", lambda row: _quantiles(curve.get(row["masks"]))),
               Column("published coefficients (GMP, T5)",
                      lambda row: f"{GMP.equivalent_dense(row['sparsity']):.2f}")]
    return f"{Table(columns, rows).markdown()}\n\n{BRACKETS}"


def coefficients_table(fits: Sequence[Fit]) -> str:
    """Coefficients of each form, and how far losses are from it."""
    rows = [{"form": fit["form"], "name": name, "value": value,
             "range": fit["interval"][name], "runs": fit["runs"], "error": fit["error"]}
            for fit in fits for name, value in fit["law"].items()]
    columns = [Column("form"), Column("runs", form="d"), Column("error", form=".2%"),
               Column("coefficient", "name"), Column("value", form=".4g"),
               Column("5% to 95%", lambda row: "{:.3g} to {:.3g}".format(*row["range"]),
                      align="right")]
    return (f"{Table(columns, rows).markdown()}\n\nError: root mean square of log(predicted / "
            "measured) of the runs that were fitted.")


def held_out_table(predictions: Sequence[PredictionRow], rows: Sequence[LossRow]) -> str:
    """Held-out cells that have been looked at: predicted and measured."""
    measured: dict[tuple, list[LossRow]] = {}
    for row in rows:
        if row.held_out:
            measured.setdefault(labels_of(row), []).append(row)
    shown = [(p, measured[labels_of(p)]) for p in predictions if labels_of(p) in measured]
    if not shown:
        return (f"{len({labels_of(p) for p in predictions})} held-out cells are predicted, and "
                "none has been looked at.")
    axes = [*shown[0][0].labels]
    columns = [*(Column(axis, lambda pair, axis=axis: pair[0].labels[axis]) for axis in axes),
               Column("form", lambda pair: pair[0].form),
               Column("fitted runs", lambda pair: pair[0].runs, "d"),
               Column("predicted", lambda pair: _quantiles(
                   (pair[0].predicted, pair[0].low, pair[0].high), ".3f"), align="right"),
               Column("measured, by seed", lambda pair: ", ".join(
                   f"{row.loss:.3f}" for row in pair[1]), align="right"),
               Column("inside", lambda pair: f"{_inside(*pair)} of {len(pair[1])}",
                      align="right")]
    counts = {}
    for prediction, own in shown:
        inside, all_of = counts.get(prediction.form, (0, 0))
        counts[prediction.form] = (inside + _inside(prediction, own), all_of + len(own))
    said = "; ".join(f"{form}: {inside} of {all_of}"
                     for form, (inside, all_of) in counts.items())
    return (f"{Table(columns, shown).markdown()}\n\nMeasured losses inside the intervals, by form: "
            f"{said}. Of intervals from 5% to 95%, 9 in 10 should be.")


def difference_table(rows: Sequence[LossRow], plot: Plot, mask: str, other: str) -> str:
    """Loss with one mask less that with another, of the same size, length and seed.

    Args:
        mask, other: labels of `plot.lines`.
    """
    lines, panel = str(plot.lines), plot.panels[0]

    def losses(label: str) -> dict[tuple, float]:
        return {(row.labels[panel], row.labels[plot.x], row.seed): row.loss for row in rows
                if row.labels[lines] == label}

    one, two = losses(mask), losses(other)
    found: dict[str, dict[str, list[float]]] = {}
    for size, length, seed in [key for key in one if key in two]:
        found.setdefault(size, {}).setdefault(length, []).append(
            one[size, length, seed] - two[size, length, seed])
    lengths = sorted({length for own in found.values() for length in own}, key=float)
    columns = [Column(panel, "size"),
               *(Column(f"{plot.x.replace('_', ' ')} {length}",
                        lambda row, length=length: _difference(row["own"].get(length)),
                        align="right") for length in lengths)]
    table = Table(columns, [{"size": size, "own": own} for size, own in found.items()]).markdown()
    values = [value for own in found.values() for each in own.values() for value in each]
    if not values:
        return f"No runs of {mask} and {other} are there of one size, length and seed."
    return (f"{table}\n\n{mask}, less {other}; on average {mean(values):+.4f}, "
            f"{sum(value < 0 for value in values)} of {len(values)} below 0.")


def _difference(values: Sequence[float] | None) -> str | None:
    center, interval = summary(list(values or []))
    if center is None:
        return None
    return f"{center:+.4f}" + ("" if interval is None else f" ± {interval:.4f}")


def _inside(prediction: PredictionRow, rows: Sequence[LossRow]) -> int:
    return sum(prediction.low <= row.loss <= prediction.high for row in rows)


def _quantiles(gain: Sequence[float] | None, form: str = ".2f") -> str | None:
    if gain is None:
        return None
    center, low, high = (format(value, form) for value in gain)
    return f"{center} [{low}, {high}]"
