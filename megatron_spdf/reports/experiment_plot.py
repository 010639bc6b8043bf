"""Plot of an experiment: loss against one axis, with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from megatron_spdf.reports.charts import color
from megatron_spdf.reports.panels import draw_panels, named
from megatron_spdf.text import label


def plot_results(rows: list[dict[str, Any]], x: str, lines: str | None, panels: list[str],
                 path: Path) -> None:
    """Draws the mean losses of `experiment.results` with their intervals.

    Cells without a loss are left out. Intervals of two seeds may be several times as wide as the
    spread of all means, so means set the range of the axis, and such bars are cut.

    Args:
        rows: result of `experiment.results`.
        x, lines, panels: axes, see `experiment.Plot`; axes named nowhere get lines of their own.
        path: picture to write.
    """
    rest = [axis for axis in rows[0]["labels"] if axis not in (x, *panels)]
    rest.sort(key=lambda axis: axis != lines)
    places = list(dict.fromkeys(row["labels"][x] for row in rows))
    pictures: dict[str, dict[str, list[dict]]] = {}
    for row in (row for row in rows if row["mean"] is not None):
        labels = row["labels"]
        picture = pictures.setdefault(", ".join(named(axis, labels[axis]) for axis in panels), {})
        picture.setdefault(", ".join(named(axis, labels[axis]) for axis in rest), []).append(row)
    means = [row["mean"] for row in rows if row["mean"] is not None]

    def draw(axes: Axes, picture: dict[str, list[dict]]) -> None:
        for number, (name, drawn) in enumerate(picture.items()):
            _draw_line(axes, [places.index(row["labels"][x]) for row in drawn], drawn,
                       color(number), name)
        tilted = {"rotation": 35, "ha": "right",
                  "rotation_mode": "anchor"} if max(map(len, places)) > 6 else {}
        axes.set_xticks(range(len(places)), list(map(label, places)), **tilted)
        axes.set(xlabel=label(x))
        if rest:
            axes.legend(fontsize=7.5)
        room = max(0.05, 0.5 * (max(means) - min(means)))
        axes.set_ylim(min(means) - room, max(means) + room)

    draw_panels(pictures, draw, "validation loss (nats)", path, shared_y=True)


def _draw_line(axes: Axes, x: list[int], rows: list[dict], color: str, name: str) -> None:
    axes.errorbar(x, [row["mean"] for row in rows], yerr=[row["interval"] or 0.0 for row in rows],
                  fmt="o-", markersize=3.6, capsize=2, linewidth=1.4, color=color,
                  label=label(name))
