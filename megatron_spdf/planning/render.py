"""The planner's overview as text."""

from __future__ import annotations

from typing import Any

from megatron_spdf.planning.parts import render_stage_bytes
from megatron_spdf.tables import GIB, MIB, SECONDS, Column, Table, Unit

RUN_FLOPS = Unit("1e18", 1e18)
MEMORY = ("parameters", "gradients", "master", "moments", "expanded", "masks", "teacher",
          "activations", "temporaries", "buffers", "total")


def render_overview(facts: dict[str, Any]) -> str:
    """All sections, one below the other."""
    return "\n\n".join(section(facts) for section in (
        _head, _flops, _layouts, _misfits, _memory, _traffic, _time, _sparsity, _assumptions))


def _head(facts: dict[str, Any]) -> str:
    model, request = facts["model"], facts["request"]
    gpu = request["gpu"]
    sparse = (f"{model['active'] / 1e9:.3g}B of {model['linear_weights'] / 1e9:.3g}B linear "
              f"weights active, sparsity {model['sparsity']:.2%}" if model["sparsity"] else "dense")
    own = facts["own_layout"]
    lines = [
        f"decoder of {model['layers']} layers x {model['hidden']}, "
        f"{model['parameters'] / 1e9:.4g}B parameters; {sparse}",
        f"{model['tokens'] / 1e9:,.4g}B tokens in {model['steps']:,} steps of "
        f"{model['tokens_per_step']:,}; {model['precision']}",
        *(f"  {stage}" for stage in model["stages"]),
        *([_of_stages(facts)] if model["stages"] else []),
        *model.get("moves", []),
        f"{request['gpus']:,} x {gpu['name']}: {gpu['memory'] / GIB.size:.1f} GiB, of which "
        f"{request['usable_bytes'] / GIB.size:.1f} are counted on; "
        f"{gpu[model['precision']] / 1e12:,.4g} TFLOP/s, products at {request['efficiency']:.0%} "
        f"of that ({request['efficiency_from']})"]
    if own:
        fits = "fits" if own["fits"] else "does not fit"
        lines.append(f"the recipe's own layout ({_layout(own)}) {fits}: "
                     f"{own['peak_bytes'] / GIB.size:,.1f} GiB on stage {own['fullest_stage']}, "
                     f"{own['step_seconds']:.3g} s a step")
    return "\n".join(lines)


def _of_stages(facts: dict[str, Any]) -> str:
    """What figures are of which stage, and what each of them holds."""
    dense = facts["model"]["sparsity"] == 0.0
    which = ("bytes and times are those of the last stage, which is dense; FLOPs are of all"
             if dense else "a layout fits if the fullest stage does; other bytes and times are "
                           "those of the last, FLOPs are of all")
    return f"{which}\nat the recipe's own layout\n{render_stage_bytes(facts['model']['held'])}"


def _layout(row: dict[str, Any]) -> str:
    return (f"tensor {row['tensor']} x pipeline {row['pipeline']} x data {row['data']}, interleave "
            f"{row['interleave']}, micro-batch {row['micro_batch']}, recompute {row['recompute']}")


def layout_name(row: dict[str, Any]) -> str:
    """Short name of a layout: TP2 PP4 DP8, with v2 where pipeline stages are interleaved."""
    interleaved = f" v{row['interleave']}" if row.get("interleave", 1) > 1 else ""
    return f"TP{row['tensor']} PP{row['pipeline']} DP{row['data']}{interleaved}"


def flops_table(facts: dict[str, Any]) -> Table:
    """FLOPs by stage and sparsity."""
    parts = ("linear", "attention", "logits", "total")
    return Table([Column("FLOPs per token (1e9)", "what"),
                  *(Column(part, lambda row, part=part: row[part] / 1e9, ".4g") for part in parts),
                  Column("whole run", "run", ",.2f", RUN_FLOPS)], facts["flops"])


def layouts_table(facts: dict[str, Any]) -> Table:
    """The fastest layouts."""
    columns = [Column("layout", layout_name), Column("micro-batch", "micro_batch", "d"),
               Column("recompute"), Column("memory", "peak_bytes", ".1f", GIB),
               Column("step", "step_seconds", ".4g", SECONDS),
               Column("tokens/s", "tokens_per_second", ",.0f"), Column("MFU", "mfu", ".1%"),
               Column("hours", form=",.1f"), Column("GPU hours", "gpu_hours", ",.1f")]
    if facts["request"]["price"] is not None:
        columns.append(Column("cost", form=",.0f"))
    return Table(columns, facts["layouts"])


def traffic_table(facts: dict[str, Any]) -> Table:
    """Bytes that a GPU sends in a step."""
    return Table([Column("kind"), Column("operation"), Column("ranks", form="d"), Column("link"),
                  Column("payload", form=",.2f", unit=MIB),
                  Column("on the wire", "wire", ",.2f", MIB),
                  Column("dense run", "dense_payload", ",.2f", MIB)], facts["best"]["traffic"])


def sparsity_table(facts: dict[str, Any]) -> Table:
    """The run at other sparsities."""
    return Table([Column("sparsity", form=".2%"), Column("", _mark),
                  Column("FLOPs", "run_flops", ",.2f", RUN_FLOPS),
                  Column("of dense", "flops_ratio", ".3f"),
                  Column("memory", "peak_bytes", ".2f", GIB),
                  Column("data-parallel, a step", "data_traffic", ",.1f", MIB),
                  Column("fewest GPUs", lambda row: row["fewest_gpus"] or None, "d"),
                  Column("their layout", _fewest_layout)], facts["sparsity"])


def _mark(row: dict[str, Any]) -> str:
    return ", ".join(["the recipe"] * row["recipe"] + ["zeros skipped"] * row["skips_zeros"])


def _fewest_layout(row: dict[str, Any]) -> str | None:
    return layout_name(row["fewest_layout"]) if row["fewest_layout"] else None


def _flops(facts: dict[str, Any]) -> str:
    return flops_table(facts).text()


def _layouts(facts: dict[str, Any]) -> str:
    return (f"{facts['fitting']:,} layouts fit; the fastest, with the best micro-batch and "
            f"recomputation of each:\n{layouts_table(facts).text('  ')}\n"
            "  v: model chunks per pipeline rank; micro-batch: sequences; memory: of a GPU, at "
            "most; sequence parallelism with TP > 1")


def _misfits(facts: dict[str, Any]) -> str:
    if not facts["misfits"]:
        return "Every TP x PP x DP has a variant that fits."
    return "\n".join(["Rejected layouts, closest first:",
                      *(f"  {layout_name(m)}: {m['reason']}" for m in facts["misfits"])])


def _memory(facts: dict[str, Any]) -> str:
    columns = [Column("", lambda row: f"stage {row['stage']}"),
               *(Column(part, lambda row, part=part: row[part] / GIB.size, ".3f")
                 for part in MEMORY if part in facts["best"]["memory"][0])]
    zero = " / ".join(f"{n / GIB.size:.2f}" for n in facts["best"]["zero"])
    return ("The fastest layout, GiB per GPU at the fullest moment of a step:\n"
            f"{Table(columns, facts['best']['memory']).text('  ')}\n"
            f"  state of stage 0, without activations, at ZeRO-0 / 1 / 2 / 3: {zero}  (2 and 3: "
            "DeepSpeed)")


def _traffic(facts: dict[str, Any]) -> str:
    table = traffic_table(facts)
    if not table.rows:
        return "One GPU sends nothing."
    return f"Sent per step by a GPU of the busiest stage:\n{table.text('  ')}"


def _time(facts: dict[str, Any]) -> str:
    time = facts["best"]["time"]
    total = sum(time.values())
    parts = ", ".join(f"{name} {seconds / total:.1%}" for name,
                      seconds in time.items() if seconds > 0.0005 * total)
    return f"Of its step, {total:.4g} s: {parts}"


def _sparsity(facts: dict[str, Any]) -> str:
    return ("What sparsity buys (at that layout; the fewest GPUs at one sequence per micro-batch, "
            f"layers recomputed):\n{sparsity_table(facts).text('  ')}\n  {flops_note(facts)}")


def flops_note(facts: dict[str, Any]) -> str:
    """What FLOPs of a sparse run are, and what a step costs."""
    skips = any(row["skips_zeros"] for row in facts["sparsity"])
    but = ", except where its kernels skip zeros" if skips else ""
    return ("FLOPs count active weights, the paper's way; this engine expands weights and runs "
            f"products at the dense cost{but}.")


def _assumptions(facts: dict[str, Any]) -> str:
    return ("Assumed: flash attention; ranks numbered tensor, data, pipeline, filling nodes in "
            "that order; rings\nwithout latency; docs/planning.md has the list. --calibrate RUN "
            "measures, --exact counts real buffers.")
