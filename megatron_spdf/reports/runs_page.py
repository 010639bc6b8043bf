"""Report of any runs: their configuration, their curves, and SPDF's table of them beside the
paper's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from urllib.parse import quote

from megatron_spdf.paths import real
from megatron_spdf.reports import paper
from megatron_spdf.reports.charts import Line, Scale, line_chart, mean_line
from megatron_spdf.reports.comparison import SCRIPT, comparison
from megatron_spdf.reports.document import (
    bullets,
    contents,
    details,
    escape,
    figure,
    heading,
    key,
    legend,
    page,
    paragraph,
    plots,
)
from megatron_spdf.reports.mask_moves import moves_section
from megatron_spdf.reports.pens import Pen, pen
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.samples import samples_section
from megatron_spdf.reports.seeds import SameRecipe, same_recipe
from megatron_spdf.reports.spdf_table import own_table
from megatron_spdf.runs.measured import finite_losses
from megatron_spdf.tables import GIB, MIB, Column, Html, Table, Unit
from megatron_spdf.text import counted

PRINTED = Unit("1e18 FLOPs", 1.0)
FALL = 0.1  # share of a run in which the loss may lie above the axis
NOTE = ("A line is averaged over neighbors, and over runs that differ in their seeds alone, with a "
        "band from the least to the largest of them. Points are validation losses. The first tenth "
        "of a loss may lie above the axis. Memory is the largest allocation so far on a GPU, "
        "resident memory on a CPU. Time is that of training steps alone.")


def render_report(runs: Sequence[Logged], output: Path, title: str,
                  left_out: Sequence[str] = ()) -> str:
    """HTML page of runs. One pen identifies runs that differ in their seeds alone, in all plots.

    Args:
        runs: to report.
        output: file of the page; links to recipes are relative to it.
        title: of the page.
        left_out: sentences on runs that are not on it.
    """
    groups = same_recipe(runs)
    pens = {run.directory: pen(number) for number, group in enumerate(groups)
            for run in group.runs}
    notes = [*left_out, *(note for run in runs for note in run.notes)]
    sections = [
        [heading("Runs", name="runs"), _runs_table(runs, pens, output),
         bullets(notes) if notes else ""],
        [heading("FLOPs and scores, as in SPDF's table", name="flops"), own_table(runs, pens),
         details("Published figures", "".join(_papers_tables()))],
        *_training(groups, pens), comparison(groups, pens), moves_section(groups, pens),
        samples_section(runs, pens),
        [heading("Recipes", name="recipes"), *(_recipe(run, output) for run in runs)]]
    about = (f"{counted(len(runs), 'run')}, {date.today().isoformat()}. Losses are in "
             "nats per token; FLOPs count active weights, SPDF's way.")
    parts = [part for section in sections for part in section]
    return page(title, [heading(title, 1), paragraph(about, "lead"), contents(parts), *parts],
                SCRIPT if len(runs) > 1 else "")


def _training(groups: Sequence[SameRecipe], pens: Mapping[Path, Pen]) -> list[list[str]]:
    """A section of plots for each kind of runs that is there."""
    kinds = {"Pre-training": [g for g in groups if not g.runs[0].fine_tunes],
             "Fine-tuning": [g for g in groups if g.runs[0].fine_tunes]}
    return [[heading(name, name=name.lower()),
             legend({group.label: pens[group.runs[0].directory] for group in chosen}),
             _curves(name, chosen, pens)] for name, chosen in kinds.items() if chosen]


def _runs_table(runs: Sequence[Logged], pens: Mapping[Path, Pen], output: Path) -> str:
    columns = [
        Column("run", lambda run: Html(f'{key(pens[run.directory])}<a href="'
                                       f'{_link(run, output)}">{escape(run.label)}</a>'),
               wraps=True),
        Column("sparsity", form=".2%"),
        Column("tokens", lambda run: si(run.tokens), align="right"),
        Column("steps", _steps, align="right"),
        Column("validation loss", "validation_loss", ".4f"),
        Column("perplexity", _perplexity, align="right"),
        Column("training FLOPs", "flops", ".3g"),
        Column("tokens/s, median", lambda run: si(run.tokens_per_second), align="right"),
        Column("state of rank 0", "state_bytes", ",.1f", MIB),
        Column("sent per step", lambda run: run.bytes.get("sent_per_step"), ",.1f", MIB),
        Column("peak memory", "peak_bytes", ",.2f", GIB)]
    return Table(columns, runs).html()


def si(value: float) -> str:
    """Number with four digits, and an SI prefix from ten thousand on."""
    for least, size, prefix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"),
                                (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / size:.4g}{prefix}"
    return f"{value:,.4g}"


def _perplexity(run: Logged) -> str | None:
    """Perplexity with two digits, unless it has blown up."""
    found = run.perplexity
    return found if found is None else f"{found:,.2f}" if found < 1e6 else f"{found:.3g}"


def _steps(run: Logged) -> str:
    last, planned = run.train[-1]["step"], run.planned_steps
    return f"{last:,} of {planned:,}" if planned and last < planned else f"{last:,}"


def _link(run: Logged, output: Path) -> str:
    return quote(os.fsencode(os.path.relpath(run.recipe, real(output).parent)))


def _curves(kind: str, groups: Sequence[SameRecipe], pens: Mapping[Path, Pen]) -> str:
    """Plots losses against tokens, FLOPs and time, and other figures against steps.

    Args:
        kind: of the runs, for the names of the plots.
    """
    longest = max(run.hours()[-1] for group in groups for run in group.runs)
    clock, factor = ("hours", 1.0) if longest >= 2.0 else ("minutes", 60.0)
    views: dict[str, tuple[str, Callable[[Logged], list[float]]]] = {
        "Loss against tokens": ("consumed tokens", lambda run: [r["tokens"] for r in run.train]),
        "Loss against training FLOPs": ("training FLOPs",
                                        lambda run: [r["flops"] for r in run.train]),
        "Loss against time": (f"{clock} of training",
                              lambda run: [factor * h for h in run.hours()]),
    }
    figures = [figure(title, line_chart(
        [_losses(group, pens, places) for group in groups], xlabel, "loss (nats)",
        f"{kind}: {title}", Scale(plain_x=title.endswith("time"), fall=FALL)))
               for title, (xlabel, places) in views.items()]
    whole = Scale(from_zero=True)
    others = {"Gradient norm": ("grad_norm", "gradient norm", 1.0, Scale(log_y=True)),
              "Throughput": ("tokens_per_second", "tokens/s", 1.0, whole),
              "Memory of rank 0": ("memory_bytes", "GiB", 2**-30, whole),
              "Measured sparsity": ("sparsity", "sparsity (%)", 100.0, whole),
              "Learning rate": ("lr", "learning rate", 1.0, Scale())}
    for title, (name, ylabel, scaled, scale) in others.items():
        lines = [_at_steps(group, pens, name, scaled) for group in groups]
        if any(line.y for line in lines):
            figures.append(figure(title, line_chart(lines, "step", ylabel, f"{kind}: {title}",
                                                    scale)))
    return plots(figures) + paragraph(NOTE, "note")


def _losses(group: SameRecipe, pens: Mapping[Path, Pen],
            places: Callable[[Logged], list[float]]) -> Line:
    """Training losses over `places`, one for each record, with the validation losses at their
    steps."""
    courses, points = [], []
    for run in group.runs:
        at = {r["step"]: x for r, x in zip(run.train, places(run), strict=True)}
        courses.append({r["step"]: (at[r["step"]], r["loss"]) for r in finite_losses(run.train)})
        points.append({r["step"]: (at[r["step"]], r["loss"]) for r in run.valid if r["step"] in at})
    return mean_line(group.label, pens[group.runs[0].directory], courses, points)


def _at_steps(group: SameRecipe, pens: Mapping[Path, Pen], name: str, scale: float) -> Line:
    """Another figure of the records, multiplied by a number."""
    return mean_line(group.label, pens[group.runs[0].directory], [
        {step: (step, scale * value) for step, value in run.at_steps(name).items()}
        for run in group.runs])


def _papers_tables() -> list[str]:
    """Published tables 1 and 2, and their contradictions."""
    columns = [
        Column("published", lambda r: paper.NAMES[r[0]] if r[1] == 0.0 else ""),
        Column("sparsity", lambda r: r[1], ".0%"),
        Column("pre-training", lambda r: paper.PRETRAINING[r[0]][r[1]][1], ".2f", PRINTED),
        Column("fine-tuning, E2E", lambda r: paper.FINE_TUNING[r[0]][1]["E2E"], ".3f", PRINTED),
        Column("together", lambda r: paper.TOGETHER[r[0]][r[1]][0], ".2f", PRINTED),
        Column("speed-up", lambda r: paper.TOGETHER[r[0]][r[1]][1], ".2f", suffix="x"),
        *(Column(score, lambda r, i=i: paper.SCORES[r[0]][r[1]][i], ".2f")
          for i, score in enumerate(paper.SCORED))]
    rows = [(model, level) for model in paper.NAMES for level in paper.TOGETHER[model]]
    source = "Thangarasa et al. 2023, tables 1 and 2, and supplement, tables 2 and 3, as printed."
    doubts = [f"{c.cells}: {c.why}." for c in paper.CONTRADICTIONS]
    return [Table(columns, rows).html(source),
            paragraph("Where the paper contradicts itself:", "note"), bullets(doubts)]


def _recipe(run: Logged, output: Path) -> str:
    text = f"<pre>{escape(run.recipe.read_text())}</pre>"
    return details(run.label, f'<a href="{_link(run, output)}">recipe.yaml</a>{text}')
