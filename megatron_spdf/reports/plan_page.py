"""Page of the planner's overview, with plots."""

from __future__ import annotations

from typing import Any

from megatron_spdf.reports.charts import stacked_bars
from megatron_spdf.reports.document import (
    bullets,
    escape,
    figure,
    heading,
    page,
    paragraph,
    plots,
    table,
)

GIB, MIB = 2**30, 2**20
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
    cost = facts["request"]["price"] is not None
    head = ["layout", "micro-\nbatch", "recompute", "GiB per\nGPU", "seconds\na step", "tokens/s",
            "MFU", "hours",
            "GPU\nhours", *(["cost"] if cost else [])]
    rows = [[_name(r), str(r["micro_batch"]), r["recompute"], f"{r['peak_bytes'] / GIB:.1f}",
             f"{r['step_seconds']:.4g}", f"{r['tokens_per_second']:,.0f}", f"{r['mfu']:.1%}",
             f"{r['hours']:,.1f}",
             f"{r['gpu_hours']:,.1f}", *([f"{r['cost']:,.0f}"] if cost else [])]
            for r in facts["layouts"]]
    about = (f"{facts['fitting']:,} layouts fit; the fastest, with the best micro-batch and "
             "recomputation of each.")
    return table(head, rows, about, marked=[0])


def _misfits(facts: dict[str, Any]) -> list[str]:
    if not facts["misfits"]:
        return []
    reasons = [f"TP{m['tensor']} PP{m['pipeline']} DP{m['data']}: {m['reason']}"
               for m in facts["misfits"]]
    return [paragraph("Rejected layouts, closest first:", "note"), bullets(reasons)]


def _memory_plot(facts: dict[str, Any]) -> str:
    stages = facts["best"]["memory"]
    limit = facts["request"]["usable_bytes"] / GIB
    parts = {k: [row[k] / GIB for row in stages] for k in MEMORY if any(row[k] for row in stages)}
    close = max(row["total"] for row in stages) / GIB > 0.4 * limit
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
    rows = [[escape(f["what"]), *(f"{f[k] / 1e9:.4g}"
                                  for k in ("linear", "attention", "logits", "total")),
             f"{f['run'] / 1e18:,.2f}"] for f in facts["flops"]]
    return table(["1e9 per token", "linear", "attention", "logits", "total", "whole run\n(1e18)"],
                 rows)


def _traffic(facts: dict[str, Any]) -> str:
    rows = [[t["kind"], t["operation"], str(t["ranks"]), t["link"], f"{t['payload'] / MIB:,.2f}",
             f"{t['wire'] / MIB:,.2f}", f"{t['dense_payload'] / MIB:,.2f}"]
            for t in facts["best"]["traffic"]]
    if not rows:
        return paragraph("One GPU sends nothing.")
    head = ["kind", "operation", "ranks", "link", "payload\n(MiB)", "on the wire\n(MiB)",
            "dense run\n(MiB)"]
    return table(head, rows, "Per step and GPU of the busiest stage.")


def _sparsity(facts: dict[str, Any]) -> str:
    rows, marked = [], []
    for number, row in enumerate(facts["sparsity"]):
        least = row["fewest_layout"]
        where = f"TP{least['tensor']} PP{least['pipeline']} DP{least['data']}" if least else "-"
        marked += [number] if row["recipe"] else []
        rows.append([f"{row['sparsity']:.2%}{', zeros skipped' if row['skips_zeros'] else ''}",
                     f"{row['run_flops'] / 1e18:,.2f}", f"{row['flops_ratio']:.3f}",
                     f"{row['peak_bytes'] / GIB:.2f}", f"{row['data_traffic'] / MIB:,.1f}",
                     str(row["fewest_gpus"] or "-"), where])
    skips = any(row["skips_zeros"] for row in facts["sparsity"])
    but = ", except where its kernels skip zeros" if skips else ""
    note = ("At the fastest layout; the fewest GPUs with one sequence a micro-batch and recomputed "
            "layers. FLOPs count active weights; this engine expands weights and runs products at "
            f"the dense cost{but}.")
    return table(["sparsity", "FLOPs\n(1e18)", "of dense", "GiB per\nGPU",
                  "data-parallel\nMiB a step", "fewest\nGPUs",
                  "their layout"], rows, marked=marked) + paragraph(note, "note")
