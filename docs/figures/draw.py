#!/usr/bin/env python3
"""Draws the pictures of the README and of docs/how_it_works.md, for a light and a dark page.

    python docs/figures/draw.py         writes docs/figures/{idea,parts}{,_dark}.svg

The mask in the picture is one that the package draws.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from megatron_spdf.sparsity.patterns.base import PATTERNS

HERE = Path(__file__).parent
SIDE, CELL = 8, 18  # entries of a side of the weight; pixels of an entry
GRID = SIDE * CELL
FONT = "font-family='Helvetica,Arial,sans-serif'"


@dataclass(frozen=True)
class Theme:
    """Colors of a page: text, faint lines, boxes, and both ends of values and of gradients."""

    suffix: str
    ink: str
    faint: str
    box: str
    values: tuple[str, str]
    gradients: tuple[str, str]


LIGHT = Theme("", "#1f2328", "#8c959f", "#eef2f6", ("#9ec9f5", "#0a58b0"), ("#f5c99e", "#b8560b"))
DARK = Theme("_dark", "#e6edf3", "#8b949e", "#1d242d", ("#1c4f86", "#79bbff"),
             ("#7a3d0b", "#ffb06b"))


def mix(ends: tuple[str, str], share: float) -> str:
    """The color so far between two, share in [0, 1]."""
    first, last = ([int(color[i:i + 2], 16) for i in (1, 3, 5)] for color in ends)
    parts = [round(a + (b - a) * share) for a, b in zip(first, last, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def text(theme: Theme, x: float, y: float, words: str, size: int = 14, weight: str = "normal",
         anchor: str = "middle", color: str = "") -> str:
    return (f"<text x='{x:g}' y='{y:g}' {FONT} font-size='{size}' font-weight='{weight}' "
            f"text-anchor='{anchor}' fill='{color or theme.ink}'>{escape(words)}</text>")


def cell(theme: Theme, x: float, y: float, fill: str = "none") -> str:
    return (f"<rect x='{x:g}' y='{y:g}' width='{CELL}' height='{CELL}' fill='{fill}' "
            f"stroke='{theme.faint}' stroke-width='0.7'/>")


def grid(theme: Theme, x: float, y: float, fills: list[str]) -> str:
    """A square of cells, row by row."""
    return "".join(cell(theme, x + i % SIDE * CELL, y + i // SIDE * CELL, fill)
                   for i, fill in enumerate(fills))


def arrow(theme: Theme, *points: tuple[float, float], color: str = "") -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (f"<polyline points='{path}' fill='none' stroke='{color or theme.ink}' "
            f"stroke-width='2' marker-end='url(#head)'/>")


def box(theme: Theme, x: float, y: float, width: float, height: float) -> str:
    return (f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='8' "
            f"fill='{theme.box}' stroke='{theme.faint}'/>")


def picture(theme: Theme, width: int, height: int, title: str, parts: list[str]) -> str:
    """An SVG file."""
    head = (f"<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
            f"markerHeight='7' orient='auto-start-reverse'><path d='M0,0 L10,5 L0,10 z' "
            f"fill='{theme.ink}'/></marker></defs>")
    return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
                      f"width='{width}' height='{height}' role='img'>",
                      f"<title>{escape(title)}</title>", head, *parts, "</svg>", ""])


def idea(theme: Theme) -> str:
    """Mask -> vector of active values -> dense weight when the layer runs -> gradient cut back."""
    mask = PATTERNS.get("unstructured")().draw(0, "picture", 0, (SIDE, SIDE), 0.75).reshape(-1)
    # raw words, which are the same in every release of NumPy
    values, gradient = np.random.Philox(key=0).random_raw(2 * mask.size).reshape(2, -1) / 2.0**64
    fill = [mix(theme.values, share) for share in values]
    slope = [mix(theme.gradients, share) for share in gradient]
    active = np.flatnonzero(mask)
    left, middle, right, top, bottom = 24, 250, 640, 58, 262
    end = middle + len(active) * CELL
    first, second = top + GRID / 2 - CELL / 2, bottom + GRID / 2 - CELL / 2

    def say(x: float, y: float, words: str, faint: bool = False, size: int = 13) -> str:
        return text(theme, x, y, words, size, color=theme.faint if faint else "")

    def name(x: float, y: float, words: str) -> str:
        return text(theme, x, y, words, 15, "bold")

    return picture(theme, 960, 446, "The parameter of a sparse layer is the vector of its active "
                   "values", [
        name(left + GRID / 2, 26, "1  mask"),
        say(left + GRID / 2, 45, "which weights are active"),
        grid(theme, left, top, [theme.ink if on else "none" for on in mask]),
        say(left + GRID / 2, top + GRID + 20, "64 bits, 16 of them set"),
        arrow(theme, (left + GRID + 8, first + CELL / 2), (middle - 8, first + CELL / 2)),
        name((middle + end) / 2, first - 34, "2  parameter: the active values"),
        say((middle + end) / 2, first - 13, "all that engine and optimizer see"),
        *(cell(theme, middle + i * CELL, first, fill[at]) for i, at in enumerate(active)),
        arrow(theme, (end + 8, first + CELL / 2), (right - 8, first + CELL / 2)),
        say((end + right) / 2, first - 2, "expand"),
        name(right + GRID / 2, 26, "3  dense weight"),
        say(right + GRID / 2, 45, "made when the layer runs"),
        grid(theme, right, top, [fill[i] if on else "none" for i, on in enumerate(mask)]),
        *layer(theme, right + GRID, top, bottom),
        name(right + GRID / 2, bottom + GRID + 21, "4  gradient of the dense weight"),
        grid(theme, right, bottom, slope),
        arrow(theme, (right - 8, second + CELL / 2), (end + 8, second + CELL / 2)),
        say((end + right) / 2, second - 2, "compress"),
        *(cell(theme, middle + i * CELL, second, slope[at]) for i, at in enumerate(active)),
        name((middle + end) / 2, second + 43, "5  gradient, cut back to the mask"),
        *engine(theme, middle, end, first + CELL, second),
    ])


def layer(theme: Theme, x: float, top: float, bottom: float) -> list[str]:
    """The layer, from the dense weight down to its gradient."""
    center, width = x + 86, 116
    return [box(theme, center - width / 2, top + 103, width, bottom - top - 60),
            text(theme, center, top + 140, "linear layer", 15, "bold"),
            text(theme, center, top + 165, "y = W x", 14),
            text(theme, center, top + 190, "forward,", 13),
            text(theme, center, top + 207, "then backward", 13),
            arrow(theme, (x + 8, top + GRID / 2), (center, top + GRID / 2), (center, top + 100)),
            arrow(theme, (center, bottom + 46), (center, bottom + GRID / 2),
                  (x + 8, bottom + GRID / 2))]


def engine(theme: Theme, start: float, end: float, above: float, below: float) -> list[str]:
    """The engine, between the values and their gradient."""
    center, top = (start + end) / 2, above + 38
    height = below - above - 76
    lines = ["Megatron-Core or DeepSpeed", "buffers, traffic, shards, masters,",
             "moments, clipping, checkpoints:", "16 entries each instead of 64"]
    rows = [text(theme, center, top + 28 + 21 * i, line, 13, "normal" if i else "bold")
            for i, line in enumerate(lines)]
    return [box(theme, start, top, end - start, height), *rows,
            arrow(theme, (center, below - 4), (center, top + height + 3)),
            arrow(theme, (center, top - 3), (center, above + 4))]


# name -> (file, what it does, column, row)
PARTS = {
    "recipe": ("megatron_spdf/recipe/recipe.py", "what a run is, one YAML file", 0, 0),
    "plan": ("megatron_spdf/sparsity/plan.py", "weight -> pattern and density", 1, 0),
    "planner": ("megatron_spdf/planning/overview.py", "bytes, traffic, time, layouts", 2, 0),
    "layer": ("megatron_spdf/layers/compact.py", "expands values, cuts gradients", 2, 1),
    "loop": ("megatron_spdf/training/loop.py", "batch, step, move, log, save", 0, 1),
    "engine": ("megatron_spdf/engine/base.py", "forward, backward, update", 1, 1),
    "checkpoint": ("megatron_spdf/checkpoint/checkpointer.py", "tensors, free of the layout", 1, 2),
}
WIDTH, HEIGHT, ACROSS, DOWN = 272, 84, 334, 140


def parts(theme: Theme) -> str:
    """The seven parts of the heart, and what passes between them."""
    def at(part: str) -> tuple[float, float]:
        _, _, column, row = PARTS[part]
        return 10 + column * ACROSS, 10 + row * DOWN

    drawn = []
    for part, (file, words, _, _) in PARTS.items():
        x, y = at(part)
        drawn += [box(theme, x, y, WIDTH, HEIGHT),
                  text(theme, x + WIDTH / 2, y + 26, part, 17, "bold"),
                  text(theme, x + WIDTH / 2, y + 48, words, 14),
                  text(theme, x + WIDTH / 2, y + 69, file.removeprefix("megatron_spdf/"), 12,
                       color=theme.faint)]
    gap, half = ACROSS - WIDTH, HEIGHT / 2
    x0, x1, x2 = (10 + column * ACROSS for column in range(3))
    y0, y1, y2 = (10 + row * DOWN for row in range(3))
    right0, right1 = x0 + WIDTH + 4, x1 + WIDTH + 4
    rows = [arrow(theme, (right0, y0 + half), (x1 - 4, y0 + half)),
            arrow(theme, (right1, y0 + half), (x2 - 4, y0 + half)),
            arrow(theme, (x1 + WIDTH - 40, y0 + HEIGHT + 4), (x1 + WIDTH - 40, y0 + DOWN - 28),
                  (x2 + 60, y0 + DOWN - 28), (x2 + 60, y1 - 4)),
            arrow(theme, (x0 + WIDTH / 2, y0 + HEIGHT + 4), (x0 + WIDTH / 2, y1 - 4)),
            arrow(theme, (right0, y1 + 28), (x1 - 4, y1 + 28)),
            arrow(theme, (x1 - 4, y1 + 60), (right0, y1 + 60)),
            arrow(theme, (right1, y1 + 28), (x2 - 4, y1 + 28)),
            arrow(theme, (x2 - 4, y1 + 60), (right1, y1 + 60)),
            arrow(theme, (x1 + 80, y1 + HEIGHT + 4), (x1 + 80, y2 - 4)),
            arrow(theme, (x1 + WIDTH - 80, y2 - 4), (x1 + WIDTH - 80, y1 + HEIGHT + 4))]
    small = [text(theme, right0 - 4 + gap / 2, y1 + 21, "batch", 12),
             text(theme, right0 - 4 + gap / 2, y1 + 77, "loss", 12),
             text(theme, right1 - 4 + gap / 2, y1 + 21, "x, dy", 12),
             text(theme, right1 - 4 + gap / 2, y1 + 77, "y, dv", 12),
             text(theme, x1 + 72, y1 + HEIGHT + 34, "save", 12, anchor="end"),
             text(theme, x1 + WIDTH - 72, y1 + HEIGHT + 34, "restore", 12, anchor="start"),
             text(theme, x2 + 68, y0 + DOWN - 18, "mask", 12, anchor="start")]
    return picture(theme, 960, 10 + 2 * DOWN + HEIGHT + 10, "The seven parts and what passes "
                   "between them", [*drawn, *rows, *small])


PICTURES = {"idea": idea, "parts": parts}


def files() -> dict[str, str]:
    """The text of every file, by its name."""
    return {f"{name}{theme.suffix}.svg": draw(theme)
            for name, draw in PICTURES.items() for theme in (LIGHT, DARK)}


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, content in files().items():
        (HERE / name).write_text(content)
        print(HERE / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
