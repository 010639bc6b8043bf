"""The planner's overview as text."""

from __future__ import annotations

from typing import Any

GIB, MIB = 2**30, 2**20
MEMORY = ("parameters", "gradients", "master", "moments", "expanded", "masks", "activations",
          "temporaries", "buffers",
          "total")


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
        f"GPT of {model['layers']} layers x {model['hidden']}, {model['parameters'] / 1e9:.4g}B "
        f"parameters; {sparse}",
        f"{model['tokens'] / 1e9:,.4g}B tokens in {model['steps']:,} steps of "
        f"{model['tokens_per_step']:,}; {model['precision']}",
        *(f"  {stage}" for stage in model["stages"]),
        *(["bytes and times are those of the last stage, which is dense; FLOPs are of all"]
          if model["stages"] else []),
        *model.get("moves", []),
        f"{request['gpus']:,} x {gpu['name']}: {gpu['memory'] / GIB:.1f} GiB, of which "
        f"{request['usable_bytes'] / GIB:.1f} are counted on; "
        f"{gpu[model['precision']] / 1e12:,.4g} TFLOP/s, products at {request['efficiency']:.0%} "
        f"of that ({request['efficiency_from']})"]
    if own:
        fits = "fits" if own["fits"] else "does not fit"
        lines.append(f"the recipe's own layout ({_layout(own)}) {fits}: "
                     f"{own['peak_bytes'] / GIB:,.1f} GiB on stage {own['fullest_stage']}, "
                     f"{own['step_seconds']:.3g} s a step")
    return "\n".join(lines)


def _layout(row: dict[str, Any]) -> str:
    return (f"tensor {row['tensor']} x pipeline {row['pipeline']} x data {row['data']}, interleave "
            f"{row['interleave']}, micro-batch {row['micro_batch']}, recompute {row['recompute']}")


def _flops(facts: dict[str, Any]) -> str:
    lines = [f"{'FLOPs per token (1e9)':<52}{'linear':>10}{'attention':>11}{'logits':>9}"
             f"{'total':>10}{'run (1e18)':>14}"]
    for f in facts["flops"]:
        parts = "".join(f"{f[k] / 1e9:>{w}.4g}" for k,
                        w in (("linear", 10), ("attention", 11), ("logits", 9),
                                                            ("total", 10)))
        lines.append(f"  {f['what']:<50}{parts}{f['run'] / 1e18:>14,.2f}")
    return "\n".join(lines)


def _layouts(facts: dict[str, Any]) -> str:
    shown, cost = facts["layouts"], facts["request"]["price"] is not None
    lines = [f"{facts['fitting']:,} layouts fit; the fastest, with the best micro-batch and "
             "recomputation of each:",
             f"  {'TP':>4}{'PP':>4}{'DP':>6}{'v':>4}{'mb':>4} "
             f"{'recompute':<10}{'GiB':>7}{'s/step':>10}{'tokens/s':>13}{'MFU':>7}{'hours':>10}"
             f"{'GPU hours':>12}" + (f"{'cost':>14}" if cost else "")]
    for r in shown:
        lines.append(f"  {r['tensor']:>4}{r['pipeline']:>4}{r['data']:>6}{r['interleave']:>4}"
                     f"{r['micro_batch']:>4} {r['recompute']:<10}{r['peak_bytes'] / GIB:>7.1f}"
                     f"{r['step_seconds']:>10.4g}{r['tokens_per_second']:>13,.0f}{r['mfu']:>7.1%}"
                     f"{r['hours']:>10,.1f}{r['gpu_hours']:>12,.1f}"
                     + (f"{r['cost']:>14,.0f}" if cost else ""))
    lines.append("  v: model chunks per pipeline rank; mb: sequences per micro-batch; sequence "
                 "parallelism with TP > 1")
    return "\n".join(lines)


def _misfits(facts: dict[str, Any]) -> str:
    if not facts["misfits"]:
        return "Every TP x PP x DP has a variant that fits."
    lines = ["Rejected layouts, closest first:"]
    lines += [f"  TP {m['tensor']} x PP {m['pipeline']} x DP {m['data']}: {m['reason']}"
              for m in facts["misfits"]]
    return "\n".join(lines)


def _memory(facts: dict[str, Any]) -> str:
    lines = ["The fastest layout, GiB per GPU at the fullest moment of a step:",
             f"  {'':<9}" + "".join(f"{name:>12}" for name in MEMORY)]
    for row in facts["best"]["memory"]:
        lines.append(f"  {'stage ' + str(row['stage']):<9}"
                     + "".join(f"{row[k] / GIB:>12.3f}" for k in MEMORY))
    zero = " / ".join(f"{n / GIB:.2f}" for n in facts["best"]["zero"])
    lines.append(f"  state of stage 0, without activations, at ZeRO-0 / 1 / 2 / 3: {zero}  (2 and "
                 "3: DeepSpeed)")
    return "\n".join(lines)


def _traffic(facts: dict[str, Any]) -> str:
    lines = ["Sent per step by a GPU of the busiest stage, MiB:",
             f"  {'kind':<11}{'operation':<16}{'ranks':>6}  "
             f"{'link':<15}{'payload':>12}{'on the wire':>13}{'dense run':>12}"]
    for t in facts["best"]["traffic"]:
        lines.append(f"  {t['kind']:<11}{t['operation']:<16}{t['ranks']:>6}  {t['link']:<15}"
                     f"{t['payload'] / MIB:>12,.2f}{t['wire'] / MIB:>13,.2f}"
                     f"{t['dense_payload'] / MIB:>12,.2f}")
    if len(lines) == 2:
        lines = ["One GPU sends nothing."]
    return "\n".join(lines)


def _time(facts: dict[str, Any]) -> str:
    time = facts["best"]["time"]
    total = sum(time.values())
    parts = ", ".join(f"{name} {seconds / total:.1%}" for name,
                      seconds in time.items() if seconds > 0.0005 * total)
    return f"Of its step, {total:.4g} s: {parts}"


def _sparsity(facts: dict[str, Any]) -> str:
    lines = ["What sparsity buys (at that layout; the fewest GPUs at one sequence per micro-batch, "
             "layers recomputed):",
             f"  {'sparsity':>8}{'FLOPs (1e18)':>15}{'of dense':>10}{'GiB per GPU':>13}"
             f"{'DP MiB/step':>13}{'fewest GPUs':>13}   layout of these"]
    for row in facts["sparsity"]:
        least, layout = row["fewest_gpus"], row["fewest_layout"]
        where = (f"TP {layout['tensor']} x PP {layout['pipeline']} x DP {layout['data']}" if layout
                 else "none")
        mark = "  <- the recipe" if row["recipe"] else ""
        lines.append(f"  {row['sparsity']:>8.2%}{row['run_flops'] / 1e18:>15,.2f}"
                     f"{row['flops_ratio']:>10.3f}{row['peak_bytes'] / GIB:>13.2f}"
                     f"{row['data_traffic'] / MIB:>13,.1f}"
                     f"{least if least else '-':>13}   {where}{mark}")
    skips = any(row["skips_zeros"] for row in facts["sparsity"])
    but = ", except where its kernels skip zeros" if skips else ""
    lines.append("  FLOPs count active weights, the paper's way; this engine expands weights and "
                 f"runs products at the dense cost{but}.")
    return "\n".join(lines)


def _assumptions(facts: dict[str, Any]) -> str:
    return ("Assumed: flash attention; ranks numbered tensor, data, pipeline, filling nodes in "
            "that order; rings\nwithout latency; docs/planning.md has the list. --calibrate RUN "
            "measures, --exact counts real buffers.")
