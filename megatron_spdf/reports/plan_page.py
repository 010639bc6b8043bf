"""Page of the planner's overview, with plots."""

from __future__ import annotations

from typing import Any

from megatron_spdf.reports.charts import stacked_bars
from megatron_spdf.reports.document import bullets, figure, heading, page, paragraph, plots
from megatron_spdf.tables import GIB, MIB, Column, Table, Unit

RUN_FLOPS, TOKEN_FLOPS = Unit("1e18", 1e18), Unit("1e9 per token", 1e9)
MEMORY = ("parameters", "gradients", "master", "moments", "expanded", "masks", "activations",
          "temporaries", "buffers")


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
        heading("FLOPs"), _flops(facts), heading("Traffic"), _traffic(facts),
        heading("What sparsity buys"), _sparsity(facts)])


def _name(row: dict[str, Any]) -> str:
    interleaved = f" v{row['interleave']}" if row["interleave"] > 1 else ""
    return f"TP{row['tensor']} PP{row['pipeline']} DP{row['data']}{interleaved}"


def _layouts(facts: dict[str, Any]) -> str:
    columns = [
        Column("layout", _name), Column("micro-batch", "micro_batch", "d"), Column("recompute"),
        Column("per GPU", "peak_bytes", ".1f", GIB),
        Column("seconds a step", "step_seconds", ".4g"),
        Column("tokens/s", "tokens_per_second", ",.0f"), Column("MFU", "mfu", ".1%"),
        Column("hours", form=",.1f"), Column("GPU hours", "gpu_hours", ",.1f")]
    if facts["request"]["price"] is not None:
        columns.append(Column("cost", form=",.0f"))
    about = (f"{facts['fitting']:,} layouts fit; the fastest, with the best micro-batch and "
             "recomputation of each.")
    return Table(columns, facts["layouts"]).html(about, marked=[0])


def _misfits(facts: dict[str, Any]) -> list[str]:
    if not facts["misfits"]:
        return []
    reasons = [f"TP{m['tensor']} PP{m['pipeline']} DP{m['data']}: {m['reason']}"
               for m in facts["misfits"]]
    return [paragraph("Rejected layouts, closest first:", "note"), bullets(reasons)]


def _memory_plot(facts: dict[str, Any]) -> str:
    stages = facts["best"]["memory"]
    limit = facts["request"]["usable_bytes"] / GIB.size
    parts = {k: [row[k] / GIB.size for row in stages] for k in MEMORY
             if any(row[k] for row in stages)}
    close = max(row["total"] for row in stages) / GIB.size > 0.4 * limit
    svg = stacked_bars([f"stage {row['stage']}" for row in stages], parts,
                       "GiB per GPU at the fullest moment",
                       "memory", (limit, "usable") if close else None)
    return figure(f"Memory of {_name(facts['layouts'][0])}", svg, wide=True)


def _time_plot(facts: dict[str, Any]) -> str:
    rows = facts["layouts"]
    parts = {k: [row["time"][k] for row in rows] for k in rows[0]["time"]}
    parts = {k: v for k, v in parts.items() if any(v)}
    svg = stacked_bars([_name(r) for r in rows], parts, "seconds", "time")
    return figure("Where a step's time goes", svg, wide=True)


def _flops(facts: dict[str, Any]) -> str:
    parts = ("linear", "attention", "logits", "total")
    columns = [Column("FLOPs", "what"), *(Column(p, form=".4g", unit=TOKEN_FLOPS) for p in parts),
               Column("whole run", "run", ",.2f", RUN_FLOPS)]
    return Table(columns, facts["flops"]).html()


def _traffic(facts: dict[str, Any]) -> str:
    columns = [Column("kind"), Column("operation"), Column("ranks", form="d"), Column("link"),
               Column("payload", form=",.2f", unit=MIB),
               Column("on the wire", "wire", ",.2f", MIB),
               Column("dense run", "dense_payload", ",.2f", MIB)]
    rows = facts["best"]["traffic"]
    if not rows:
        return paragraph("One GPU sends nothing.")
    return Table(columns, rows).html("Per step and GPU of the busiest stage.")


def _sparsity(facts: dict[str, Any]) -> str:
    rows = facts["sparsity"]
    columns = [
        Column("sparsity", _level), Column("FLOPs", "run_flops", ",.2f", RUN_FLOPS),
        Column("of dense", "flops_ratio", ".3f"), Column("per GPU", "peak_bytes", ".2f", GIB),
        Column("data-parallel, a step", "data_traffic", ",.1f", MIB),
        Column("fewest GPUs", lambda row: row["fewest_gpus"] or None, "d"),
        Column("their layout", _fewest_layout)]
    but = ", except where its kernels skip zeros" if any(r["skips_zeros"] for r in rows) else ""
    note = ("At the fastest layout; the fewest GPUs with one sequence a micro-batch and recomputed "
            "layers. FLOPs count active weights; this engine expands weights and runs products at "
            f"the dense cost{but}.")
    marked = [number for number, row in enumerate(rows) if row["recipe"]]
    return Table(columns, rows).html(marked=marked) + paragraph(note, "note")


def _level(row: dict[str, Any]) -> str:
    return f"{row['sparsity']:.2%}{', zeros skipped' if row['skips_zeros'] else ''}"


def _fewest_layout(row: dict[str, Any]) -> str | None:
    least = row["fewest_layout"]
    return f"TP{least['tensor']} PP{least['pipeline']} DP{least['data']}" if least else None
