"""Comparison of two runs that a reader picks: losses, what they cost, and how their recipes differ.

The page has the first pair as it stands, and the figures of all runs for comparison.js, which shows
another pair by the rules written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import t as student

from megatron_spdf.reports.charts import Scale, line_chart, mean_line
from megatron_spdf.reports.document import embed, escape, figure, heading, key, paragraph, plots
from megatron_spdf.reports.pens import COLORS, STYLES, Pen
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.seeds import OWN, SameRecipe, flat
from megatron_spdf.runs.experiment import summary
from megatron_spdf.runs.measured import finite_losses
from megatron_spdf.tables import GIB, MIB, Column, Html, Table
from megatron_spdf.text import printable

SCRIPT = Path(__file__).with_name("comparison.js").read_text(encoding="utf-8")
DIFFERENCE, RATIO, NEITHER = "difference", "ratio", ""
NONE = "-"


@dataclass(frozen=True)
class Figure:
    """Row of the comparison.

    Attributes:
        of: takes a run and returns its value, None where it has none.
        form: format of a value, and of a difference.
        against: how the second run is set against the first.
    """

    title: str
    of: Callable[[Logged], float | None]
    form: str
    against: str = RATIO
    size: float = 1.0

    def values(self, runs: Sequence[Logged]) -> list[float | None]:
        """Value of each run, None where it is not finite."""
        found = [self.of(run) for run in runs]
        return [None if v is None or not math.isfinite(v) else v / self.size for v in found]

    def cell(self, runs: Sequence[Logged]) -> str:
        """Mean over runs as text, with half the width of its 95% confidence interval."""
        center, interval = summary([v for v in self.values(runs) if v is not None])
        if center is None:
            return NONE
        if interval is None or self.against != DIFFERENCE:
            return format(center, self.form)
        return f"{format(center, self.form)} ± {format(interval, self.form)}"


FIGURES = (
    Figure("validation loss", lambda run: run.validation_loss, ".4f", DIFFERENCE),
    Figure("training loss, mean of the last tenth", lambda run: run.training_loss, ".4f",
           DIFFERENCE),
    Figure("sparsity, measured (%)", lambda run: run.sparsity, ".2f", NEITHER, 0.01),
    Figure("steps", lambda run: run.train[-1]["step"], ",.0f"),
    Figure("tokens", lambda run: run.tokens, ",.0f"),
    Figure("training FLOPs", lambda run: run.flops, ".3g"),
    Figure("tokens/s, median", lambda run: run.tokens_per_second, ",.0f"),
    Figure("state of rank 0 (MiB)", lambda run: run.state_bytes, ",.1f", size=MIB.size),
    Figure("sent per step (MiB)", lambda run: run.bytes.get("sent_per_step"), ",.1f",
           size=MIB.size),
    Figure("peak memory (GiB)", lambda run: run.peak_bytes, ",.2f", size=GIB.size))


def figures_of(runs: Sequence[Logged]) -> list[Figure]:
    """Rows that any of the runs has a value for; scores come last."""
    metrics = sorted({name for run in runs for name in run.scores})
    scores = [Figure(name, lambda run, name=name: run.scores.get(name), ".4f", DIFFERENCE)
              for name in metrics]
    return [row for row in (*FIGURES, *scores) if any(v is not None for v in row.values(runs))]


def comparison(groups: Sequence[SameRecipe], pens: Mapping[Path, Pen]) -> list[str]:
    """Section of a page; nothing for one run.

    Args:
        groups: all runs of the page.
        pens: directory of a run -> its pen.
    """
    runs = [run for group in groups for run in group.runs]
    if len(runs) < 2:
        return []
    means = [group for group in groups if len(group.runs) > 1]
    choices = [*means, *(SameRecipe((run,)) for run in runs)]
    first, second = _first_pair(groups, choices)
    figures = figures_of(runs)
    note = ("± is half the width of the 95% confidence interval over seeds (Student's t). Where "
            "both have runs of the same seeds, a difference is the mean over these of B less A, "
            "with its own interval; else it is that of the means. x is B over A.")
    heads = [_head(*named, pens) for named in zip("AB", (choices[first], choices[second]), STYLES,
                                                  strict=False)]
    pair = choices[first], choices[second]
    return [heading("Comparison of two runs", name="compare"),
            _form(choices, len(means), first, second), _figures(pair, figures, heads),
            paragraph(note, "note"), _curves(choices, (first, second), pens),
            *_recipes(pair, heads),
            embed("comparison", _data(choices, figures, pens, len(runs)))]


def _first_pair(groups: Sequence[SameRecipe], choices: Sequence[SameRecipe]) -> tuple[int, int]:
    """Numbers of the choices that are shown first: two recipes, or two seeds of the only one."""
    shown = [next(i for i, choice in enumerate(choices) if choice.runs == group.runs)
             for group in groups[:2]]
    return (shown[0], shown[1]) if len(shown) == 2 else (1, 2)


def _form(choices: Sequence[SameRecipe], means: int, first: int, second: int) -> str:
    """Two menus, for a page whose script runs."""
    def options(numbers: range, chosen: int) -> str:
        return "".join(f'<option value="{i}"{" selected" * (i == chosen)}>'
                       f"{escape(choices[i].label)}</option>" for i in numbers)

    menus = []
    for name, chosen in (("A", first), ("B", second)):
        single = options(range(means, len(choices)), chosen)
        inside = (f'<optgroup label="means over seeds">{options(range(means), chosen)}</optgroup>'
                  f'<optgroup label="runs">{single}</optgroup>' if means else single)
        menus.append(f'<label>{name}: <select id="pair-{name.lower()}">{inside}</select></label>')
    return f'<form id="pair" aria-label="Runs to compare" hidden>{" ".join(menus)}</form>'


def _head(name: str, choice: SameRecipe, style: str, pens: Mapping[Path, Pen]) -> Html:
    """Head of a column of the pair."""
    pen = Pen(pens[choice.runs[0].directory].color, style)
    return Html(f"{key(pen)}{name}: {escape(choice.label)}")


def _figures(pair: tuple[SameRecipe, SameRecipe], figures: Sequence[Figure],
             heads: Sequence[Html]) -> str:
    """Table of what both come to."""
    a, b = (choice.runs for choice in pair)
    rows = [(row.title, row.cell(a), row.cell(b), against(row, a, b)) for row in figures]
    rows = [row for row in rows if row[1:3] != (NONE, NONE)]
    return f'<div id="pair-figures">{_table(("figure", *heads, "B against A"), rows)}</div>'


def _recipes(pair: tuple[SameRecipe, SameRecipe], heads: Sequence[Html]) -> list[str]:
    """The keys in which their recipes differ."""
    keys = different_keys(*pair)
    same = len(recipe_of(pair[0]).keys() | recipe_of(pair[1]).keys()) - len(keys)
    return [f'<p id="pair-said" aria-live="polite">{_said(len(keys), same)}</p>',
            f'<div id="pair-keys">{_table(("key", *heads), keys, text=True)}</div>']


def _said(differ: int, same: int) -> str:
    return f"Keys of the recipes: {differ} differ, {same} are the same."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    columns = [Column(head, lambda row, i=i: row[i], align="left" if text or not i else "right",
                      wraps=text) for i, head in enumerate(heads)]
    return Table(columns, rows).html("Recipes, where they differ" if text else
                                     "A and B after their last records")


def against(row: Figure, a: Sequence[Logged], b: Sequence[Logged]) -> str:
    """What the second runs are against the first, as text.

    A difference is that of runs of the same seeds where there are any, with half the width of its
    95% confidence interval; else that of the means.
    """
    first, second = _by_seed(row, a), _by_seed(row, b)
    if not first or not second or row.against == NEITHER:
        return ""
    if row.against == RATIO:
        below = mean(first.values())
        return f"{mean(second.values()) / below:.2f}x" if below else ""
    both = [second[seed] - first[seed] for seed in first if seed in second]
    center, interval = summary(both or [mean(second.values()) - mean(first.values())])
    return f"{center:+{row.form}}" + ("" if interval is None else
                                      f" ± {format(interval, row.form)}")


def _by_seed(row: Figure, runs: Sequence[Logged]) -> dict[str, float]:
    return {str(run.seed): value for run, value in zip(runs, row.values(runs), strict=True)
            if value is not None}


def recipe_of(choice: SameRecipe) -> dict[str, str]:
    """Keys of the recipe of runs, without those in which they differ among themselves."""
    keys = [flat(run.values) for run in choice.runs]
    return {name: value for name, value in keys[0].items()
            if name not in OWN and all(other.get(name) == value for other in keys)}


def different_keys(a: SameRecipe, b: SameRecipe) -> list[tuple[str, str, str]]:
    """Key and both values, in the order of the first recipe; a dash where one has no such key."""
    first, second = recipe_of(a), recipe_of(b)
    return [(name, first.get(name, NONE), second.get(name, NONE)) for name in {**first, **second}
            if first.get(name) != second.get(name)]


def _curves(choices: Sequence[SameRecipe], pair: tuple[int, int],
            pens: Mapping[Path, Pen]) -> str:
    """Training losses of all choices, of which the pair's alone are to be seen."""
    views = {"tokens": ("consumed tokens", "tokens"), "FLOPs": ("training FLOPs", "flops")}
    made = []
    for title, (xlabel, field) in views.items():
        lines = [mean_line(choice.label, pens[choice.runs[0].directory], [
            {r["step"]: (r[field], r["loss"]) for r in finite_losses(run.train)}
            for run in choice.runs], name=f"series-{number}")
            for number, choice in enumerate(choices)]
        svg = line_chart(lines, xlabel, "training loss (nats)", f"Pair: loss against {title}",
                         Scale(fall=0.1))
        for number, place in zip(pair, ("first", "second"), strict=True):
            svg = svg.replace(f'class="series-{number}"', f'class="series-{number} {place}"')
        made.append(figure(f"Losses of A (solid) and B (dashed) against {title}", svg))
    return f'<div class="pair">{plots(made)}</div>'


def _data(choices: Sequence[SameRecipe], figures: Sequence[Figure], pens: Mapping[Path, Pen],
          runs: int) -> dict[str, Any]:
    """What comparison.js needs of every choice; of the recipes the keys that differ anywhere."""
    recipes = [recipe_of(choice) for choice in choices]
    common = [name for name, value in recipes[0].items()
              if all(other.get(name) == value for other in recipes)]
    return {"against": [row.against for row in figures],
            "digits": [int(row.form[-2]) for row in figures],
            "titles": [row.title for row in figures],
            "same": len(common),
            "student": [0.0, 0.0, *(float(student.ppf(0.975, n - 1)) for n in range(2, runs + 1))],
            "choices": [_choice(choice, {k: v for k, v in recipe.items() if k not in common},
                                figures, pens[choice.runs[0].directory])
                        for choice, recipe in zip(choices, recipes, strict=True)]}


def _choice(choice: SameRecipe, keys: dict[str, str], figures: Sequence[Figure],
            pen: Pen) -> dict[str, Any]:
    return {"label": printable(choice.label), "color": COLORS.index(pen.color),
            "keys": {printable(k): printable(v) for k, v in keys.items()},
            "cells": [row.cell(choice.runs) for row in figures],
            "values": [list(_by_seed(row, choice.runs).items()) for row in figures]}
