"""From the suite's JSON to the rates that the planner predicts steps with.

    python tools/benchmark.py rates docs/benchmarks/CARD.json --page docs/planning.md

Writes megatron_spdf/planning/measured_rates.json, and between `<!-- rates -->` and `<!-- end of
rates -->` of each page the rates, and every measured step beside what they predict.

- products, memory: least squares of relative errors over GPT-3 XL's steps and GPT-2 Small's busy
  seconds, dense and unstructured. Products by themselves are slower than those in a step.
- patterns: those at which GPT-3 XL's steps as one CUDA graph are right; without such a step, of the
  kernels' table, the dense products' seconds over the pattern's.
- host: seconds of a step over its layers and micro-batches, launched one by one: geometric means
  over GPT-2 Small's and GPT-3 XL's steps for which the GPU alone is predicted to be faster.
- attention: of a profile by hand, since the suite does not time it alone (ATTENTION).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import host, marked_page, page, sizes
from megatron_spdf.files import write_json
from megatron_spdf.planning.hardware import GPUS, Gpu
from megatron_spdf.planning.rates import DENSE, FILE, Rates
from megatron_spdf.planning.step_time import StepTime, predicted_step
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import Column, Table

MARK = "rates"
# GPT-3 XL, 2,048 tokens, on an H100 (2026-11-27): 385 TFLOP/s forward and backward in cuDNN's
# kernels, where products had 760.
ATTENTION = 0.5
PARTS = "; run the suite's parts kernels, training and host, and name all reports"
FITTED = ("GPT-3 XL", "GPT-2 Small")  # the models that rates are fitted to
# Than predicted for the GPU alone, which a warm one is by 5%: the host is what a step waits for.
SLOWER = 1.1


@dataclass(frozen=True)
class Step:
    """A measured step.

    Attributes:
        what: model and run.
        seconds: of the step.
        busy: seconds of it in which the GPU computed; None: not measured.
    """

    what: str
    recipe: Recipe
    seconds: float
    busy: float | None = None

    @property
    def plan(self) -> Plan:
        return Plan.of(self.recipe)

    @property
    def patterns(self) -> set[str]:
        return {weight.pattern.name for weight in self.plan.weights.values()} or {DENSE}

    @property
    def launches(self) -> int:
        """Layers that are launched in a step."""
        return self.recipe.model.layers * self.recipe.micro_batches

    def predicted(self, gpu: Gpu, rates: Rates) -> StepTime:
        return predicted_step(self.recipe, self.plan, gpu, rates)


def measured_steps(report: page.Report) -> list[Step]:
    """The steps of a report, in its order."""
    scale = sizes.scale_of(report["scale"])
    patterns = {"dense": sizes.DENSE, **scale.patterns}
    ways = {way: words for way, (words, _) in host.WAYS.items() if way != "layers compiled"}
    known: dict[tuple[str, str], tuple[str, Recipe]] = {}
    for (name, pattern), (way, words), again in product(patterns.items(), ways.items(),
                                                        ("", ", again")):
        ran = f"{name}{again}" + (f", {way}" if words else "")
        known["training", ran] = f"GPT-3 XL, {ran}", scale.recipe(pattern, *words)
    for name, pattern in {"dense": sizes.DENSE, **scale.few}.items():
        for way, words in ways.items():
            known["host", f"{name}, {way}"] = (f"GPT-2 Small, {name}, {way}",
                                               scale.small_recipe(pattern, *words))
        for family, model in scale.families.items():
            known["families", f"{family}, {name}"] = (f"{family}, {name}",
                                                      scale.family(model, pattern))
    rows = [(table, row) for table in ("training", "families", "host")
            for row in page.rows_of(report, table)]
    return [Step(*known[table, row["what"]], row["step (s)"], _busy(row)) for table, row in rows
            if (table, row["what"]) in known]


def _busy(row: dict) -> float | None:
    share = row.get("GPU busy (%)")
    return row["step (s)"] * share / 100 if share is not None else None


def fit(report: page.Report, gpu: Gpu) -> Rates:
    """The rates that explain a report best.

    Raises:
        ValueError: it lacks dense and unstructured steps, or no share of the peaks explains them.
    """
    steps = measured_steps(report)
    whole = Rates(1.0, ATTENTION, 1.0, _pattern_rates(report))
    parts, seconds = [], []  # over the seconds of a step: at the peak rates, and of the update not
    for step in steps:
        spent = step.busy or step.seconds
        if step.patterns <= {DENSE, "unstructured"} and (step.busy or "GPT-3" in step.what):
            there = step.predicted(gpu, whole)
            parts.append([there.compute / spent, there.memory / spent])
            seconds.append(1.0 - there.update / spent)
    if len(parts) < 2:
        raise ValueError("the report has fewer than two dense or unstructured steps of GPT-3 XL or "
                         f"GPT-2 Small{PARTS}")
    slower = np.linalg.lstsq(np.array(parts), np.array(seconds), rcond=None)[0]
    if slower.min() < 1.0:
        raise ValueError(f"the report's steps are explained best by products {slower[0]:.2f} and "
                         f"memory {slower[1]:.2f} times slower than {gpu.name}'s peaks, which "
                         "cannot be; is it a report of another program?")
    device = replace(whole, products=float(1 / slower[0]), memory=float(1 / slower[1]))
    source = (f"{report['device']}, {report['date'][:10]}, "
              + ", ".join(f"{name} {number}" for name, number in report["versions"].items()
                          if name in ("torch", "triton", "megatron-core")))
    device = replace(device, patterns=_in_steps(steps, gpu, device))
    return replace(device, host=_host_seconds(steps, gpu, device), source=source)


def _pattern_rates(report: page.Report) -> dict[str, float]:
    """Rates of patterns whose products were timed beside dense ones."""
    scale, found = sizes.scale_of(report["scale"]), {}
    rows = page.rows_of(report, "kernels")
    for name, pattern in scale.patterns.items():
        own = [row for row in rows if row["what"] == name and row.get("dense / time")]
        if own:
            weight = next(iter(Plan.of(scale.recipe(pattern)).weights.values()))
            dense = math.fsum(row["time (us)"] * row["dense / time"] for row in own)
            share = weight.active / weight.numel if weight.skips_zeros else 1.0
            found[weight.pattern.product_rate] = (
                share * dense / math.fsum(row["time (us)"] for row in own))
    return found


def _in_steps(steps: Sequence[Step], gpu: Gpu, device: Rates) -> dict[str, float]:
    """Rates of patterns, of steps that wait for no host where there are any."""
    found = dict(device.patterns)
    for step in steps:
        names = {weight.pattern.product_rate for weight in step.plan.weights.values()}
        if not step.recipe.kernels.cuda_graph or "GPT-3" not in step.what or names <= {DENSE}:
            continue
        (name,) = names
        there, twice = (step.predicted(gpu, replace(device, patterns={name: rate})).total
                        for rate in (1.0, 2.0))
        products = 2.0 * (there - twice)  # seconds at the rate of dense ones
        if (left := step.seconds - (there - products)) > 0.0:
            found[name] = products / left
    return found


def _host_seconds(steps: Sequence[Step], gpu: Gpu, device: Rates) -> dict[str, float]:
    """Seconds that the host needs to launch a layer for a micro-batch, by pattern: means of steps
    that are slower than the GPU alone would be."""
    found: dict[str, list[float]] = {}
    for step in steps:
        if step.recipe.kernels.cuda_graph or not step.what.startswith(FITTED):
            continue
        (pattern,) = step.patterns
        if step.seconds > SLOWER * step.predicted(gpu, device).total:
            found.setdefault(pattern, []).append(step.seconds / step.launches)
    return {pattern: statistics.geometric_mean(each) for pattern, each in found.items()}


def rates_rows(rates: Rates) -> Iterator[dict]:
    """Rows of the table of rates."""
    yield {"rate": "dense products, of the peak", "value": f"{rates.products:.3f}"}
    yield {"rate": "attention, of dense products", "value": f"{rates.attention:.3f}"}
    yield {"rate": "what is no product, of the memory's bandwidth", "value": f"{rates.memory:.3f}"}
    for name, value in rates.patterns.items():
        yield {"rate": f"products of {name}, of dense ones", "value": f"{value:.3f}"}
    for name, value in rates.host.items():
        yield {"rate": f"host, a layer and micro-batch, {name}", "value": f"{1e3 * value:.2f} ms"}


def compared(report: page.Report, gpu: Gpu, rates: Rates) -> list[dict]:
    """Rows of the table of measured and predicted steps."""
    rows = []
    for step in measured_steps(report):
        there = step.predicted(gpu, rates)
        rows.append({"step": step.what, "measured (s)": step.seconds, "predicted (s)": there.total,
                     "of that waiting for the host (s)": there.host,
                     "predicted / measured": there.total / step.seconds})
    return rows


def write_rates(reports: Sequence[Path], pages: Sequence[Path], target: Path = FILE) -> Rates:
    """Fits and writes the rates.

    Raises:
        ValueError: see `page.render_pages` and `fit`; or a GPU that the planner does not know.
    """
    for each in pages:
        marked_page.place_on(each, MARK)
    report = page.merged([page.read_report(path) for path in reports])
    gpu = next((gpu for gpu in GPUS.values() if gpu.name in report["device"]), None)
    if gpu is None:
        raise ValueError(f"{report['device']} is not in the planner's table; add a row to "
                         "megatron_spdf/planning/hardware.py")
    rates = fit(report, gpu)
    write_json(target, asdict(rates))
    columns = [Column("step"), *(Column(name, form=".3f") for name in (
        "measured (s)", "predicted (s)", "of that waiting for the host (s)")),
        Column("predicted / measured", form=".2f")]
    text = "\n".join([f"Fitted to {rates.source}.", "",
                      Table([Column("rate"), Column("value")], list(rates_rows(rates))).markdown(),
                      "", Table(columns, compared(report, gpu, rates)).markdown(), ""])
    for each in pages:
        marked_page.write_between(each, MARK, text)
    return rates
