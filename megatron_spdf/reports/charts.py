"""Plots as inline SVG, in one style for all pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_spdf.text import label

# Okabe and Ito 2008: told apart by color-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#404040",
          "#A6761D", "#B2DF8A")
STYLE = {
    "svg.fonttype": "none", "font.size": 9.5,
    "axes.edgecolor": "#8a919c", "axes.labelcolor": "#3d444f",
    "xtick.color": "#5c6470", "ytick.color": "#5c6470",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e7eaee", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """Series of a line chart.

    Attributes:
        points: (x, y) of marks, at fewer places than the line has.
    """

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    points: tuple[Sequence[float], Sequence[float]] = field(default=((), ()))


def color(number: int) -> str:
    """Color of a series by its number, repeated after ten."""
    return COLORS[number % len(COLORS)]


def line_chart(lines: Sequence[Line], xlabel: str, ylabel: str, name: str, log_y: bool = False,
               faint: bool = False, legend: bool = True, plain: bool = False,
               from_zero: bool = False) -> str:
    """Draws lines over a common axis, whose numbers have SI prefixes.

    Args:
        lines: series.
        xlabel, ylabel: of the axes.
        name: of the plot, for screen readers and the SVG's identifiers.
        log_y: logarithmic y axis.
        faint: draw lines as noise behind their points.
        legend: name the series, if there are several.
        plain: numbers without SI prefixes.
        from_zero: let the y axis begin at 0.

    Returns:
        An SVG element.
    """
    def draw(axes: Axes) -> None:
        for line in lines:
            axes.plot(line.x, line.y, color=line.color, alpha=0.4 if faint else 1.0,
                      label=None if len(line.points[0]) else label(line.label),
                      linewidth=1.2 if faint else 1.6)
            if len(line.points[0]):
                axes.plot(*line.points, "o-", color=line.color, markersize=3.6,
                          label=label(line.label))
        if log_y:
            axes.set_yscale("log")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if from_zero:
            axes.set_ylim(0.0, 1.08 * max([1e-9, *(v for line in lines for v in line.y)]))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if not plain:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if legend and len(lines) > 1:
            axes.legend(fontsize=8.5, handlelength=1.3)

    return draw_svg(draw, name)


def stacked_bars(names: Sequence[str], parts: dict[str, Sequence[float]], xlabel: str, name: str,
                 limit: tuple[float, str] | None = None) -> str:
    """Draws horizontal bars, each a row of parts.

    Args:
        names: of the bars.
        parts: part -> its value in every bar.
        xlabel: of the values.
        name: of the plot, for screen readers and the SVG's identifiers.
        limit: value and label of a line across all bars.

    Returns:
        An SVG element.
    """
    def draw(axes: Axes) -> None:
        left = [0.0] * len(names)
        for number, (part, values) in enumerate(parts.items()):
            axes.barh(list(map(label, names)), values, left=left, label=label(part),
                      color=color(number), height=0.62)
            left = [a + b for a, b in zip(left, values, strict=True)]
        if limit:
            axes.axvline(limit[0], color="#b3541e", linestyle="--", linewidth=1.2)
            axes.annotate(label(limit[1]), (limit[0], 1.0), xycoords=("data", "axes fraction"),
                          fontsize=8.5, ha="right", va="bottom", color="#b3541e")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=xlabel)
        axes.legend(fontsize=8.5, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0),
                    handlelength=1.0)

    return draw_svg(draw, name, size=(10.5, 0.9 + 0.5 * max(3, len(names))))


def draw_svg(draw: Callable[[Axes], None], name: str,
             size: tuple[float, float] = (5.4, 3.3)) -> str:
    """Renders what `draw` puts on an axis as an SVG element.

    Args:
        draw: called with the axes.
        name: of the plot, for screen readers and the SVG's identifiers.
        size: width and height in inches.
    """
    with pyplot.rc_context({**STYLE, "svg.hashsalt": name}):
        plot, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes)
        text = io.StringIO()
        plot.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(plot)
    svg = text.getvalue()
    return svg[svg.index("<svg"):].replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
