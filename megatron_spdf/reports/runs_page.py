"""Report of any runs: their configuration, their curves, and SPDF's table of them beside the
paper's."""

from __future__ import annotations

import math
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
    table,
)
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.spdf_table import own_table

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
    parts = [
        heading(title, 1),
        paragraph(f"{len(runs)} run{'s' * (len(runs) != 1)}, {date.today().isoformat()}. Losses "
                  "are in nats per token; FLOPs count active weights, SPDF's way.", "lead"),
        heading("Runs"), _runs_table(runs, colors, output),
        heading("FLOPs and scores, as in SPDF's table"),
        own_table(runs, colors), *_papers_tables(),
        *(part for name, chosen in kinds.items() if chosen
          for part in (heading(name), _curves(chosen, colors))),
        heading("Recipes"), *(_recipe(run, output) for run in runs),
    ]
    return page(title, parts)


def _runs_table(runs: Sequence[Logged], colors: dict[Path, str], output: Path) -> str:
    head = ["run", "sparsity,\nmeasured", "tokens (M)", "steps", "validation\nloss", "perplexity",
            "training\nFLOPs",
            "tokens/s,\nmedian", "state of\nrank 0 (MiB)", "sent per\nstep (MiB)",
            "peak memory\n(GiB)"]
    rows = []
    for run in runs:
        loss, steps = run.validation_loss, f"{run.train[-1]['step']:,}"
        if run.planned_steps:
            steps += f" of {run.planned_steps:,}"
        held = sum(run.bytes.get(k, 0) for k in ("parameters", "gradients", "optimizer"))
        sent = run.bytes.get("sent_per_step")
        memory = max(run.at_steps("memory_bytes").values(), default=None)
        rows.append([
            f'{key(colors[run.directory])}<a href="{_link(run, output)}">{escape(run.label)}</a>',
            f"{run.sparsity:.2%}", f"{run.tokens / 1e6:,.4g}", steps, _number(loss, ".4f"),
            _number(loss and math.exp(min(loss, 700.0)), ".2f"), f"{run.flops:.3g}",
            f"{run.tokens_per_second:,.4g}", _number(held / 2**20 if held else None, ",.1f"),
            _number(None if sent is None else sent / 2**20, ",.1f"),
            _number(memory and memory / 2**30, ",.2f")])
    return table(head, rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


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
    x, y = smooth(places, [r["loss"] for r in run.train])
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
    rows = []
    for model, name in paper.NAMES.items():
        for level, (total, speed_up) in paper.TOGETHER[model].items():
            bleu, pretraining = paper.SCORES[model][level], paper.PRETRAINING[model][level][1]
            rows.append([escape(name) if level == 0.0 else "", f"{level:.0%}", f"{pretraining:.2f}",
                         f"{paper.FINE_TUNING[model][1]['E2E']:.3f}", f"{total:.2f}",
                         f"{speed_up:.2f}x", *(f"{score:.2f}" for score in bleu)])
    head = ["published", "sparsity", "pre-training\n(1e18 FLOPs)", "fine-tuning,\nE2E", "together",
            "speed-up",
            "E2E\nBLEU", "WebNLG\nBLEU", "DART\nBLEU", "Curation\nperplexity"]
    source = "Thangarasa et al. 2023, tables 1 and 2, and supplement, tables 2 and 3, as printed."
    doubts = [f"{c.cells}: {c.why}." for c in paper.CONTRADICTIONS]
    return [table(head, rows, source), paragraph("Where the paper contradicts itself:", "note"),
            bullets(doubts)]


def _recipe(run: Logged, output: Path) -> str:
    return (f'<p><a href="{_link(run, output)}">{escape(run.label)}: '
            'recipe.yaml</a></p><details><summary>show'
            f"</summary><pre>{escape(run.recipe.read_text())}</pre></details>")
