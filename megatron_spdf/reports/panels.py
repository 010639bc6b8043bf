"""Picture of an experiment: a panel for each combination of labels, three beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from megatron_spdf.files import save_figure
from megatron_spdf.reports.charts import STYLE
from megatron_spdf.text import label

Content = TypeVar("Content")
BESIDE = 3


def draw_panels(panels: Mapping[str, Content], draw: Callable[[Axes, Content], None], ylabel: str,
                path: Path, shared_y: bool = False) -> None:
    """Draws panels and writes the picture. Without any panel it is empty.

    Args:
        panels: title -> what `draw` puts on its axes.
        ylabel: of the first panel.
        path: picture to write.
        shared_y: whether all panels have the y axis of the first one.
    """
    with pyplot.rc_context({**STYLE, "font.size": 9.5}):
        columns = min(BESIDE, max(1, len(panels)))
        rows = max(1, -(-len(panels) // columns))
        figure, grid = pyplot.subplots(rows, columns, figsize=(4.4 * columns, 3.3 * rows), dpi=140,
                                       squeeze=False, sharey=shared_y, layout="constrained")
        for axes in grid.flat[len(panels):]:
            axes.set_visible(False)
        for axes, (title, content) in zip(grid.flat, panels.items(), strict=False):
            draw(axes, content)
            axes.set(title=label(title))
        grid[0][0].set_ylabel(ylabel)
        save_figure(figure, path)
        pyplot.close(figure)


def named(axis: str, label: str) -> str:
    """Label of an axis for a title or a legend: the last part of a key, and its value."""
    return f"{axis.rpartition('.')[2]} {label}"
