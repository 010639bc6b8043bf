"""Plots as inline SVG, in one style for all pages, whose colors are those of the page's style."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_spdf.reports.pens import COLORS, Pen, color
from megatron_spdf.reports.svg import inline
from megatron_spdf.text import label, printable

STYLE = {
    "svg.fonttype": "none", "font.size": 10.0,
    "axes.edgecolor": "#8a919c", "axes.labelcolor": "#3d444f",
    "xtick.color": "#5c6470", "ytick.color": "#5c6470",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e7eaee", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False,
}
LIMIT, TEXT = "#b3541e", "#3d444f"
# Color of a plot -> variable of page.css, which has it for light and for dark pages.
THEME = {"#8a919c": "--axis", TEXT: "--text", "#5c6470": "--soft", "#e7eaee": "--grid",
         LIMIT: "--warn",
         **{color.lower(): f"--c{number}" for number, color in enumerate(COLORS)}}
SMOOTHING = 40  # points to which a noisy curve is averaged down
FAINT_FROM = 3  # points from which on they show the course of a line, which is then drawn as noise
MARKED_UP_TO = 12  # points of a line that has a mark at each


@dataclass(frozen=True)
class Line:
    """Series of a line chart.

    Attributes:
        points: (x, y) of marks, at fewer places than the line has.
        band: least and largest values about the line.
        name: of the SVG element that holds the series, for a page that shows and hides it.
    """

    label: str
    pen: Pen
    x: Sequence[float]
    y: Sequence[float]
    points: tuple[Sequence[float], Sequence[float]] = ((), ())
    band: tuple[Sequence[float], Sequence[float]] = ((), ())
    name: str = ""


@dataclass(frozen=True)
class Scale:
    """Ruling of the axes of a line chart.

    Attributes:
        log_y: logarithmic y axis.
        plain_x: numbers of the x axis without SI prefixes.
        from_zero: let the y axis begin at 0.
        fall: share of each line, at its beginning, that may lie above the y axis, as losses that
            fall fast at first would leave no room for all others.
        whole_x: whole numbers on the x axis alone.
    """

    log_y: bool = False
    plain_x: bool = False
    from_zero: bool = False
    fall: float = 0.0
    whole_x: bool = False


def smooth(x: Sequence[float], y: Sequence[float],
           most: int = SMOOTHING) -> tuple[list[float], list[float]]:
    """Averages stretches of neighbors, so that about so many points are left. Short curves are
    kept."""
    width = max(1, len(y) // most)
    starts = range(0, len(y), width)
    return ([sum(x[s:s + width]) / len(x[s:s + width]) for s in starts],
            [sum(y[s:s + width]) / len(y[s:s + width]) for s in starts])


Course = Mapping[int, tuple[float, float]]  # step -> (x, y) of a run


def mean_line(label: str, pen: Pen, courses: Sequence[Course], points: Sequence[Course] = (),
              name: str = "", most: int = SMOOTHING) -> Line:
    """Mean of runs at the steps that all of them have, averaged over neighbors, in a band from the
    least to the largest of them.

    Args:
        courses: of the line, one for each run; a run without any value is left out.
        points: of the marks, likewise.
        name: see `Line`.
        most: see `smooth`.
    """
    x, y, low, high = _over_runs(courses)
    band = (smooth(x, low, most)[1], smooth(x, high, most)[1]) if low != high else ((), ())
    return Line(label, pen, *smooth(x, y, most), _over_runs(points)[:2], band, name)


def _over_runs(courses: Sequence[Course]) -> tuple[list[float], ...]:
    """Mean x, mean y, least and largest y."""
    held = [course for course in courses if course]
    steps = [step for step in held[0] if all(step in course for course in held)] if held else []
    at = [[course[step] for course in held] for step in steps]
    means = [[mean(column) for column in zip(*every, strict=True)] for every in at]
    return ([x for x, _ in means], [y for _, y in means],
            [min(y for _, y in every) for every in at], [max(y for _, y in every) for every in at])


def line_chart(lines: Sequence[Line], xlabel: str, ylabel: str, name: str,
               scale: Scale = Scale()) -> str:
    """Draws lines over a common axis. They are told apart by the page's legend of its runs.

    Args:
        lines: series.
        xlabel, ylabel: of the axes.
        name: of the plot, one on a page: for screen readers, which are told the last value of each
            line too, and for the SVG's identifiers.
        scale: of the axes.

    Returns:
        An SVG element.
    """
    def draw(axes: Axes) -> None:
        for line in lines:
            _draw_line(axes, line)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _rule(axes, lines, scale)

    said = [f"{printable(line.label)} ends at {line.y[-1]:.4g}" if len(line.y)
            else f"{printable(line.label)} has none" for line in lines]
    return draw_svg(draw, name, about=f"{name}: {ylabel} over {xlabel}. {'; '.join(said)}.")


def _draw_line(axes: Axes, line: Line) -> None:
    style = {"color": line.pen.color, "gid": line.name or None}
    many = len(line.points[0]) >= FAINT_FROM
    axes.plot(line.x, line.y, linestyle=line.pen.style, alpha=0.4 if many else 1.0,
              linewidth=1.2 if many else 1.6, markersize=3.6,
              marker="o" if len(line.x) <= MARKED_UP_TO else "None", **style)
    if len(line.band[0]):
        axes.fill_between(line.x, *line.band, color=line.pen.color, alpha=0.15, linewidth=0,
                          gid=line.name or None)
    if len(line.points[0]):
        axes.plot(*line.points, linestyle=line.pen.style, marker="o", markersize=3.6, **style)


def _rule(axes: Axes, lines: Sequence[Line], scale: Scale) -> None:
    every = [v for line in lines for v in (*line.y, *line.points[1])]
    if scale.from_zero:
        axes.set_ylim(0.0, 1.08 * max([1e-9, *every]))
    if scale.fall and every:
        shown = [v for line in lines for v in (*line.y[int(scale.fall * len(line.y)):],
                                               *line.points[1])]
        room = max(0.02, 0.05 * (max(shown) - min(shown)))
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=scale.whole_x))
    if not scale.plain_x:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if scale.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif every and max(map(abs, every)) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def stacked_bars(names: Sequence[str], parts: dict[str, Sequence[float]], xlabel: str, name: str,
                 limit: tuple[float, str] | None = None) -> str:
    """Draws horizontal bars, each a row of parts.

    Args:
        names: of the bars.
        parts: part -> its value in every bar.
        xlabel: of the values.
        name: of the plot, for screen readers, which are told the sum of each bar too, and for the
            SVG's identifiers.
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
            axes.axvline(limit[0], color=LIMIT, linestyle="--", linewidth=1.2)
            axes.annotate(label(limit[1]), (limit[0], 1.0), xycoords=("data", "axes fraction"),
                          fontsize=8.5, ha="right", va="bottom", color=LIMIT)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=xlabel)
        axes.legend(fontsize=8.5, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0),
                    handlelength=1.0)

    sums = [f"{printable(bar)} {sum(column):.4g}" for bar, column
            in zip(names, zip(*parts.values(), strict=True), strict=True)]
    return draw_svg(draw, name, (10.5, 0.9 + 0.5 * max(3, len(names))),
                    f"{name}: {xlabel}. {'; '.join(sums)}.")


def draw_svg(draw: Callable[[Axes], None], name: str, size: tuple[float, float] = (5.4, 3.3),
             about: str = "") -> str:
    """Renders what `draw` puts on an axis as an SVG element.

    Args:
        draw: called with the axes.
        name: of the plot, for the SVG's identifiers.
        size: width and height in inches.
        about: what screen readers say; default: the name.
    """
    # Matplotlib writes no color where it is black, and black stays black on a dark page.
    with pyplot.rc_context({**STYLE, "text.color": TEXT, "svg.hashsalt": name}):
        plot, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes)
        text = io.StringIO()
        plot.savefig(text, format="svg", metadata={"Date": None, "Creator": None},
                     transparent=True)
        pyplot.close(plot)
    return inline(text.getvalue(), name, about or name, THEME)
