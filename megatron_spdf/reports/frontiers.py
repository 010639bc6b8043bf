"""Loss against training FLOPs, from a table of losses: a curve of lengths for each size of a model,
and the frontier of each way to be sparse, which is the least loss at a cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from numpy import ndarray

from megatron_spdf.files import save_figure
from megatron_spdf.reports.charts import STYLE, color
from megatron_spdf.runs.experiment import Plot, summary
from megatron_spdf.runs.loss_table import LossRow
from megatron_spdf.text import label

DARK: dict[str, Any] = {
    "figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117", "savefig.facecolor": "#0d1117",
    "axes.edgecolor": "#6e7681", "axes.labelcolor": "#c9d1d9", "text.color": "#c9d1d9",
    "xtick.color": "#9da7b3", "ytick.color": "#9da7b3", "grid.color": "#21262d",
}
DARK_COLORS = ("#58A6FF", "#F0883E", "#3FB68B", "#E3A1C6", "#E3B341", "#9CDCFE", "#B392F0",
               "#9DA7B3", "#D2A764", "#B2DF8A")
POINTS = 400  # of a frontier


@dataclass(frozen=True)
class Spot:
    """Runs of one model, one way to be sparse and one length, with several seeds.

    Attributes:
        line: label of the axis that has a frontier for each of its labels.
        algorithm: of its masks.
        curve: the other labels but the length's.
        flops: of one training.
        loss: mean in nats per token.
        interval: half the width of its 95% confidence interval (Student's t); None for one seed.
    """

    line: str
    algorithm: str
    curve: str
    flops: float
    loss: float
    interval: float | None


def spots_of(rows: Sequence[LossRow], plot: Plot) -> list[Spot]:
    """Means over seeds, in the order of their cost.

    Args:
        rows: of a table of losses; those whose label of `plot.lines` is not in `plot.frontiers`
            are left out.
    """
    found: dict[tuple[str, str, str], list[LossRow]] = {}
    for row in rows:
        labels = dict(row.labels)
        line, length = labels.pop(str(plot.lines)), labels.pop(plot.x)
        if line in plot.frontiers:
            found.setdefault((line, ", ".join(labels.values()), length), []).append(row)
    return sorted((Spot(line, same[0].algorithm, curve, mean(row.flops for row in same),
                        *summary([row.loss for row in same]))
                   for (line, curve, _), same in found.items()), key=lambda spot: spot.flops)


def frontier(spots: Sequence[Spot]) -> tuple[ndarray, ndarray]:
    """Least loss at a cost, over all models: their losses between two lengths are taken to be
    linear in the logarithm of the cost, and what is cheaper is as good.

    Returns:
        FLOPs, evenly spaced by their logarithm, and losses.
    """
    costs = np.log([spot.flops for spot in spots])
    at = np.linspace(costs.min(), costs.max(), POINTS)
    losses = []
    for curve in dict.fromkeys(spot.curve for spot in spots):
        own = sorted((spot.flops, spot.loss) for spot in spots if spot.curve == curve)
        losses.append(np.interp(at, *np.array([(np.log(x), y) for x, y in own]).T, left=np.inf))
    return np.exp(at), np.minimum.accumulate(np.min(losses, axis=0))


def plot_frontiers(rows: Sequence[LossRow], plot: Plot, path: Path, dark: bool = False) -> None:
    """Draws losses of finished runs with their intervals over seeds, thin curves through the
    lengths of a model, and the frontiers as thick lines.

    Args:
        rows: of a table of losses.
        plot: axes of the grid; `frontiers` are drawn.
        path: picture to write.
        dark: on a dark ground.
    """
    spots = spots_of(rows, plot)
    with pyplot.rc_context({**STYLE, **(DARK if dark else {})}):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.4), dpi=150, layout="constrained")
        axes.set(xscale="log", xlabel="training FLOPs", ylabel="validation loss (nats per token)")
        for number, line in enumerate(plot.frontiers):
            own = [spot for spot in spots if spot.line == line]
            if own:
                _draw(axes, own, line, DARK_COLORS[number] if dark else color(number), number)
        if spots:
            axes.legend(fontsize=9)
        save_figure(figure, path)
        pyplot.close(figure)


def _draw(axes: Axes, spots: Sequence[Spot], line: str, ink: str, number: int) -> None:
    marker = "os^Dv<>"[number % 7]
    for curve in dict.fromkeys(spot.curve for spot in spots):
        own = [spot for spot in spots if spot.curve == curve]
        axes.plot([spot.flops for spot in own], [spot.loss for spot in own], color=ink,
                  linewidth=0.9, alpha=0.45)
    axes.errorbar([spot.flops for spot in spots], [spot.loss for spot in spots],
                  yerr=[spot.interval or 0.0 for spot in spots], fmt=marker, markersize=4,
                  capsize=2.5, elinewidth=1.0, color=ink, linestyle="none")
    name = line if line == spots[0].algorithm else f"{line} ({spots[0].algorithm})"
    axes.plot(*frontier(spots), color=ink, linewidth=2.2, marker=marker, markersize=4,
              markevery=[], label=label(name))
