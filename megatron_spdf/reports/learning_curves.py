"""Learning curves of an experiment: training loss against training FLOPs, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy import ndarray

from megatron_spdf.records.json_reader import json_lines
from megatron_spdf.reports.charts import color
from megatron_spdf.reports.panels import draw_panels, named
from megatron_spdf.runs.experiment import Cell, summary
from megatron_spdf.runs.measured import LOG
from megatron_spdf.text import label

STRETCHES = 25  # of equally many records, over which a loss is averaged
FIRST = 3  # stretch from which on losses set the range of the axis: they fall fast before


def plot_curves(cells: Sequence[Cell], axes: Sequence[str], lines: str, path: Path) -> None:
    """Draws the curves of finished runs, means over seeds; bands are 95% confidence intervals.

    Args:
        cells: of the experiment.
        axes: its axes; each combination of labels of the others has a picture.
        lines: axis with a line for each of its labels.
        path: picture to write.
    """
    pictures: dict[str, list[tuple[str, ndarray]]] = {}
    for cell in cells:
        curves = _curves(cell)
        above = ", ".join(named(axis, cell.labels[axis]) for axis in axes if axis != lines)
        if curves is not None:
            pictures.setdefault(above, []).append((cell.labels[lines], curves))
    colors = {name: color(i) for i, name in enumerate(
        dict.fromkeys(cell.labels[lines] for cell in cells))}
    draw_panels(pictures, lambda drawn, picture: _draw(drawn, picture, colors),
                "training loss (nats)", path)


def _draw(axes: Axes, picture: list[tuple[str, ndarray]], colors: dict[str, str]) -> None:
    for name, curves in picture:
        flops = curves[0, :, 0]
        means, halves = zip(*(summary(list(losses)) for losses in curves[:, :, 1].T), strict=True)
        middle, half = np.array(means), np.array([h or 0.0 for h in halves])
        axes.plot(flops, middle, color=colors[name], linewidth=1.4, label=label(name))
        axes.fill_between(flops, middle - half, middle + half, color=colors[name], alpha=0.2,
                          linewidth=0)
    shown = np.concatenate([curves[:, FIRST:, 1].ravel() for _, curves in picture])
    axes.set(xlabel="training FLOPs", xscale="log",
             ylim=(shown.min() - 0.05, shown.max() + 0.05))
    axes.legend(fontsize=7.5)


def _curves(cell: Cell) -> ndarray | None:
    """FLOPs and mean loss at the end of every stretch, (seeds, stretches, 2), of the finished runs
    that are here; None without one that has as many records."""
    found = []
    for seed, trial in cell.trials.items():
        if cell.loss(seed) is None or not (trial.output / LOG).is_file():
            continue
        steps = [(r["flops"], r["loss"]) for _, r in json_lines(trial.output / LOG, dict,
                                                             constants=True, cut_short=True)
                 if r["kind"] == "train" and r["loss"] is not None]
        if len(steps) >= STRETCHES:
            found.append([(part[-1, 0], part[:, 1].mean())
                          for part in np.array_split(np.array(steps), STRETCHES)])
    return np.array(found) if found else None
