"""Pens: the color and the dashes that identify runs in all plots, legends and tables of a page."""

from __future__ import annotations

from dataclasses import dataclass

# The first four are Okabe and Ito's (2008), told apart by color-blind readers too. All have a
# contrast of 3 and more to white, and page.css has lighter ones for dark pages.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#C8679B", "#A37A00", "#3A93C4", "#6A3D9A", "#404040",
          "#A05A2C", "#6B8E23")
# As matplotlib and CSS name them.
STYLES = ("solid", "dashed", "dotted")


@dataclass(frozen=True)
class Pen:
    """Color and dashes of a line."""

    color: str
    style: str = "solid"


def color(number: int) -> str:
    """Color of a series by its number, repeated after ten."""
    return COLORS[number % len(COLORS)]


def pen(number: int) -> Pen:
    """Pen of a recipe by its number: ten colors, then the same ones dashed, then dotted."""
    return Pen(color(number), STYLES[number // len(COLORS) % len(STYLES)])
