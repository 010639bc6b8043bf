"""What became of the masks of runs that move them: plots over the steps, and a table by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from megatron_spdf.reports.charts import Line, line_chart
from megatron_spdf.reports.document import escape, figure, heading, key, paragraph, plots
from megatron_spdf.reports.runs import Logged
from megatron_spdf.runs.measured import Seen
from megatron_spdf.tables import Column, Html, Table

# Figure of a record -> title of its plot, its unit, and what its values are multiplied by.
FIGURES = {"share": ("Active entries that move", "moved (%)", 100.0),
           "overlap": ("Active entries that are as at first", "as at first (%)", 100.0),
           "age": ("Mean age of active entries", "moves", 1.0)}


def moves_section(runs: Sequence[Logged], colors: Mapping[Path, str]) -> list[str]:
    """Section of a page; nothing where no masks have moved."""
    moving = [run for run in runs if run.moves]
    if not moving:
        return []
    figures = [figure(title, _chart(moving, colors, name, unit, scale))
               for name, (title, unit, scale) in FIGURES.items()
               if any(name in record for run in moving for record in run.moves)]
    note = ("Of the active entries of all sparse weights, at each move. The first mask is that of "
            "the beginning of the run, or of its stage; what has died may have been born again. "
            "An age counts moves since an entry was born, or since that beginning.")
    return [heading("Masks that move"), plots(figures), paragraph(note, "note"),
            *(_by_layer(run, colors[run.directory]) for run in moving)]


def _chart(runs: Sequence[Logged], colors: Mapping[Path, str], name: str, unit: str,
           scale: float) -> str:
    lines = []
    for run in runs:
        found = [(r["step"], scale * r[name]) for r in run.moves if name in r]
        x, y = zip(*found, strict=True) if found else ((), ())
        lines.append(Line(run.label, colors[run.directory], x, y))
    return line_chart(lines, "step", unit, f"masks {name}", from_zero=True, plain=True)


def _by_layer(run: Logged, color: str) -> str:
    """Table of a run's layers: shares moved over all moves, overlap and age after the last."""
    last = run.moves[-1]
    rows = [("all", run.moves, last)]
    for layer in last.get("layers", {}):
        every = [record["layers"][layer] for record in run.moves
                 if layer in record.get("layers", {})]
        rows.append((layer, every, every[-1]))
    columns = [Column("layer", lambda row: row[0]),
               Column("moved, in the mean of all moves", lambda row: _mean_share(row[1]), ".3%"),
               Column("moved, in the last", lambda row: row[2]["share"], ".3%"),
               Column("as at first", lambda row: row[2].get("overlap"), ".2%"),
               Column("mean age (moves)", lambda row: row[2].get("age"), ".2f")]
    title = Html(f"{key(color)}{escape(run.label)}: {last['algorithm']}, {len(run.moves):,} moves, "
                 f"the last at step {last['step']:,}")
    return f"<h3>{title}</h3>{Table(columns, rows).html()}"


def _mean_share(records: Sequence[Seen]) -> float:
    return mean(record["share"] for record in records)
