"""Plot of an experiment: loss against one axis, with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from megatron_spdf.files import save_figure
from megatron_spdf.reports.charts import STYLE, color
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
    pictures: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in (row for row in rows if row["mean"] is not None):
        picture = pictures.setdefault(tuple(row["labels"][axis] for axis in panels), {})
        picture.setdefault(tuple(row["labels"][axis] for axis in rest), []).append(row)
    with pyplot.rc_context(STYLE):
        columns = min(3, max(1, len(pictures)))
        height = max(1, -(-len(pictures) // columns))
        figure, grid = pyplot.subplots(height, columns, figsize=(4.4 * columns, 3.3 * height),
                                       dpi=140, squeeze=False, sharey=True, layout="constrained")
        for axes in grid.flat[len(pictures):]:
            axes.set_visible(False)
        for axes, (above, picture) in zip(grid.flat, pictures.items(), strict=False):
            for number, (labels, drawn) in enumerate(picture.items()):
                axes.errorbar([places.index(row["labels"][x]) for row in drawn],
                              [row["mean"] for row in drawn],
                              yerr=[row["interval"] or 0.0 for row in drawn], fmt="o-",
                              markersize=3.6, capsize=2, linewidth=1.4, color=color(number),
                              label=label(", ".join(map(_named, rest, labels))))
            tilted = {"rotation": 35, "ha": "right",
                      "rotation_mode": "anchor"} if max(map(len, places)) > 6 else {}
            axes.set_xticks(range(len(places)), list(map(label, places)), **tilted)
            axes.set(xlabel=label(x), title=label(", ".join(map(_named, panels, above))))
            if rest:
                axes.legend(fontsize=7.5)
        means = [row["mean"] for row in rows if row["mean"] is not None]
        if means:
            room = max(0.05, 0.5 * (max(means) - min(means)))
            grid[0][0].set_ylim(min(means) - room, max(means) + room)
        grid[0][0].set_ylabel("validation loss (nats)")
        save_figure(figure, path)
        pyplot.close(figure)


def _named(axis: str, label: str) -> str:
    return f"{axis.rpartition('.')[2]} {label}"
