"""Report of any runs: their configuration, their curves, and SPDF's table of them beside the
paper's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from urllib.parse import quote

from megatron_spdf.reports import paper
from megatron_spdf.reports.charts import Line, color, line_chart
from megatron_spdf.reports.document import (
    bullets,
    escape,
    figure,
    heading,
    key,
    page,
    paragraph,
    plots,
)
from megatron_spdf.reports.mask_moves import moves_section
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.spdf_table import own_table
from megatron_spdf.runs.measured import finite_losses
from megatron_spdf.tables import GIB, MIB, Column, Html, Table, Unit

MILLION, PRINTED = Unit("M", 1e6), Unit("1e18 FLOPs", 1.0)
SMOOTHING = 40  # points to which a noisy curve is averaged down


def render_report(runs: Sequence[Logged], output: Path, title: str) -> str:
    """HTML page of runs. One color identifies a run in all plots.

    Args:
        runs: to report.
        output: file of the page; links to recipes are relative to it.
        title: of the page.
    """
    kinds = {"Pre-training": [r for r in runs if not r.fine_tunes],
             "Fine-tuning": [r for r in runs if r.fine_tunes]}
    colors = {run.directory: color(number) for number, run in enumerate(runs)}
    notes = [note for run in runs for note in run.notes]
    parts = [
        heading(title, 1),
        paragraph(f"{len(runs)} run{'s' * (len(runs) != 1)}, {date.today().isoformat()}. Losses "
                  "are in nats per token; FLOPs count active weights, SPDF's way.", "lead"),
        heading("Runs"), _runs_table(runs, colors, output), bullets(notes) if notes else "",
        heading("FLOPs and scores, as in SPDF's table"),
        own_table(runs, colors), *_papers_tables(),
        *(part for name, chosen in kinds.items() if chosen
          for part in (heading(name), _curves(chosen, colors))),
        *moves_section(runs, colors),
        heading("Recipes"), *(_recipe(run, output) for run in runs),
    ]
    return page(title, parts)


def _runs_table(runs: Sequence[Logged], colors: dict[Path, str], output: Path) -> str:
    columns = [
        Column("run", lambda run: Html(f'{key(colors[run.directory])}<a href="'
                                       f'{_link(run, output)}">{escape(run.label)}</a>')),
        Column("sparsity, measured", "sparsity", ".2%"),
        Column("tokens", form=",.4g", unit=MILLION),
        Column("steps", _steps, align="right"),
        Column("validation loss", "validation_loss", ".4f"), Column("perplexity", form=".2f"),
        Column("training FLOPs", "flops", ".3g"),
        Column("tokens/s, median", "tokens_per_second", ",.4g"),
        Column("state of rank 0", "state_bytes", ",.1f", MIB),
        Column("sent per step", lambda run: run.bytes.get("sent_per_step"), ",.1f", MIB),
        Column("peak memory", "peak_bytes", ",.2f", GIB)]
    return Table(columns, runs).html()


def _steps(run: Logged) -> str:
    steps = f"{run.train[-1]['step']:,}"
    return f"{steps} of {run.planned_steps:,}" if run.planned_steps else steps


def _link(run: Logged, output: Path) -> str:
    return quote(os.path.relpath(run.recipe, output.resolve().parent))


def _curves(runs: Sequence[Logged], colors: dict[Path, str]) -> str:
    """Plots losses against tokens, FLOPs and time, and other figures against steps."""
    longest = max(run.hours()[-1] for run in runs)
    clock, factor = ("hours", 1.0) if longest >= 2.0 else ("minutes", 60.0)
    views: dict[str, tuple[str, Callable[[Logged], list[float]]]] = {
        "Loss against tokens": ("consumed tokens", lambda run: [r["tokens"] for r in run.train]),
        "Loss against training FLOPs": ("training FLOPs",
                                        lambda run: [r["flops"] for r in run.train]),
        "Loss against time": (f"{clock} of training",
                              lambda run: [factor * h for h in run.hours()]),
    }
    faint = any(run.valid for run in runs)
    figures = [figure(title, line_chart(
        [_curve(run, colors[run.directory], places(run)) for run in runs], xlabel, "loss (nats)",
        title, faint=faint, plain=title.endswith("time")))
               for title, (xlabel, places) in views.items()]
    figures += [
        figure("Gradient norm",
               _figure_chart(runs, colors, "grad_norm", "gradient norm", log_y=True)),
        figure("Throughput",
               _figure_chart(runs, colors, "tokens_per_second", "tokens/s", from_zero=True)),
        figure("Memory of rank 0",
               _figure_chart(runs, colors, "memory_bytes", "GiB", scale=2**-30, from_zero=True)),
        figure("Measured sparsity",
               _figure_chart(runs, colors, "sparsity", "sparsity (%)", scale=100.0,
                             from_zero=True)),
        figure("Learning rate", _figure_chart(runs, colors, "lr", "learning rate")),
    ]
    note = ("Lines are averaged over neighbors; points are validation losses. Memory is the "
            "largest allocation so far on a GPU, resident memory on a CPU. Time is that of "
            "training steps alone.")
    return plots(figures) + paragraph(note, "note")


def _curve(run: Logged, color: str, places: Sequence[float]) -> Line:
    """Training curve over `places`, one for each record, with the validation losses at their
    steps."""
    at = {r["step"]: x for r, x in zip(run.train, places, strict=True)}
    points = [(at[r["step"]], r["loss"]) for r in run.valid if r["step"] in at]
    known = finite_losses(run.train)
    x, y = smooth([at[r["step"]] for r in known], [r["loss"] for r in known])
    return Line(run.label, color, x, y, tuple(zip(*points, strict=True)) if points else ((), ()))


def smooth(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Averages stretches of neighbors, so that about SMOOTHING points are left. Short curves are
    kept."""
    width = max(1, len(y) // SMOOTHING)
    starts = range(0, len(y), width)
    return ([sum(x[s:s + width]) / len(x[s:s + width]) for s in starts],
            [sum(y[s:s + width]) / len(y[s:s + width]) for s in starts])


def _figure_chart(runs: Sequence[Logged], colors: dict[Path, str], name: str, ylabel: str,
                  scale: float = 1.0, log_y: bool = False, from_zero: bool = False) -> str:
    lines = []
    for run in runs:
        found = run.at_steps(name)
        x, y = smooth(list(found), [scale * v for v in found.values()])
        lines.append(Line(run.label, colors[run.directory], x, y))
    return line_chart(lines, "step", ylabel, ylabel, log_y=log_y, legend=False, from_zero=from_zero)


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
    return (f'<p><a href="{_link(run, output)}">{escape(run.label)}: '
            'recipe.yaml</a></p><details><summary>show'
            f"</summary><pre>{escape(run.recipe.read_text())}</pre></details>")
