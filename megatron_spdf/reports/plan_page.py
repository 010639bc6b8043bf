"""Page of the planner's overview, with plots."""

from __future__ import annotations

from typing import Any

from megatron_spdf.planning.render import (
    MEMORY,
    flops_note,
    flops_table,
    layout_name,
    layouts_table,
    sparsity_table,
    traffic_table,
)
from megatron_spdf.reports.charts import stacked_bars
from megatron_spdf.reports.document import bullets, figure, heading, page, paragraph, plots
from megatron_spdf.tables import GIB


def render_plan_page(facts: dict[str, Any], recipe: str) -> str:
    """HTML page of an overview.

    Args:
        facts: result of `planning.overview.make_overview`.
        recipe: file of the recipe, for the title.
    """
    request, model = facts["request"], facts["model"]
    lead = (f"{model['parameters'] / 1e9:.4g}B parameters, linear weights {model['sparsity']:.2%} "
            f"sparse; {model['tokens'] / 1e9:,.4g}B tokens in {model['steps']:,} steps, "
            f"{model['precision']}; {request['gpus']:,} x {request['gpu']['name']}, matrix "
            f"products at {request['efficiency']:.0%} of peak ({request['efficiency_from']}).")
    return page(f"Plan of {recipe}", [
        heading(f"Plan of {recipe}", 1), paragraph(lead, "lead"),
        heading("Layouts"), _layouts(facts), *_misfits(facts),
        heading("Bytes and seconds"), plots([_memory_plot(facts), _time_plot(facts)]),
        heading("FLOPs"), flops_table(facts).html(), heading("Traffic"), _traffic(facts),
        heading("What sparsity buys"), _sparsity(facts)])


def _layouts(facts: dict[str, Any]) -> str:
    about = (f"{facts['fitting']:,} layouts fit; the fastest, with the best micro-batch and "
             "recomputation of each.")
    return layouts_table(facts).html(about, marked=[0])


def _misfits(facts: dict[str, Any]) -> list[str]:
    if not facts["misfits"]:
        return []
    reasons = [f"{layout_name(m)}: {m['reason']}" for m in facts["misfits"]]
    return [paragraph("Rejected layouts, closest first:", "note"), bullets(reasons)]


def _memory_plot(facts: dict[str, Any]) -> str:
    stages = facts["best"]["memory"]
    limit = facts["request"]["usable_bytes"] / GIB.size
    parts = {k: [row[k] / GIB.size for row in stages] for k in MEMORY[:-1]
             if any(row.get(k) for row in stages)}
    close = max(row["total"] for row in stages) / GIB.size > 0.4 * limit
    svg = stacked_bars([f"stage {row['stage']}" for row in stages], parts,
                       "GiB per GPU at the fullest moment",
                       "memory", (limit, "usable") if close else None)
    return figure(f"Memory of {layout_name(facts['layouts'][0])}", svg, wide=True)


def _time_plot(facts: dict[str, Any]) -> str:
    rows = facts["layouts"]
    parts = {k: [row["time"][k] for row in rows] for k in rows[0]["time"]}
    parts = {k: v for k, v in parts.items() if any(v)}
    svg = stacked_bars([layout_name(r) for r in rows], parts, "seconds", "time")
    return figure("Where a step's time goes", svg, wide=True)


def _traffic(facts: dict[str, Any]) -> str:
    if not facts["best"]["traffic"]:
        return paragraph("One GPU sends nothing.")
    return traffic_table(facts).html("Per step and GPU of the busiest stage.")


def _sparsity(facts: dict[str, Any]) -> str:
    marked = [number for number, row in enumerate(facts["sparsity"]) if row["recipe"]]
    note = ("At the fastest layout; the fewest GPUs with one sequence a micro-batch and recomputed "
            f"layers. {flops_note(facts)}")
    return sparsity_table(facts).html(marked=marked) + paragraph(note, "note")
