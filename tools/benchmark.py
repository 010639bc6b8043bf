#!/usr/bin/env python3
"""Measures on this machine; nothing is timed in the tests.

    python tools/benchmark.py step [RECIPE] [section.key=value ...] [--steps 20] [--output FILE.json]
    torchrun --nproc-per-node 2 tools/benchmark.py step parallel.tensor=2

`step`: seconds of an optimizer step of a recipe, dense against its sparsity, both engines in one process and their
steps in turn, so that what else the machine does hits both alike; medians and the ratio. Batches are synthetic.
Without a recipe, a model whose layers fit a CPU's caches as little as a real one's. On a GPU try for example

    python tools/benchmark.py step configs/pretrain/gpt3_xl_s75.yaml parallel.data=1 train.global_batch=32 --steps 50
"""

from __future__ import annotations

import _path  # noqa: F401  isort: skip  (first: puts the package on the path)

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from megatron_spdf.config import Recipe, load_recipe
from megatron_spdf.model.weights import model_weights
from megatron_spdf.parallel import cpu
from megatron_spdf.parallel.ranks import check_world, find_ranks, join, leave
from megatron_spdf.planning.flops import training_flops
from megatron_spdf.planning.hardware import peak_flops
from megatron_spdf.sparsity.plan import make_plan

DEFAULT = Path(__file__).resolve().parent.parent / "configs/benchmark/cpu.yaml"
WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step"])
    parser.add_argument("words", nargs="*", metavar="[RECIPE] section.key=value")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each run")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, with date, hardware and versions")
    options = parser.parse_intermixed_args()
    named = [w for w in options.words if "=" not in w]
    overrides = [w for w in options.words if "=" in w]
    recipe_path = named[0] if named else DEFAULT
    try:
        sparse = load_recipe(recipe_path, overrides)
        dense = load_recipe(recipe_path, [*overrides, "sparsity=0.0", "sparsity.rules=[]"])
        ranks = find_ranks()
        check_world(ranks, sparse.parallel)
    except ValueError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    figures = measure_steps({"dense": dense, "sparse": sparse}, options.steps)
    if ranks.rank == 0:
        report = {**circumstances(), "recipe": sparse.model_dump(), "runs": figures}
        print(render(report))
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure_steps(recipes: dict[str, Recipe], steps: int) -> dict[str, dict]:
    """Runs the recipes' engines step by step in turn; returns the figures of each."""
    cpu.install()
    import torch

    from megatron_spdf.engine.megatron import MegatronEngine

    first = next(iter(recipes.values()))
    device = join(find_ranks(), first)
    engines, seconds = {}, {name: [] for name in recipes}
    for name, recipe in recipes.items():
        plan = make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups)
        engines[name] = MegatronEngine(recipe, plan, device)
    gc.disable()
    for number in range(1, WARM_UP + steps + 1):
        batch = synthetic_batch(first, number)
        for name, engine in engines.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            engine.step(batch, number, number * first.tokens_per_step, False)
            torch.cuda.synchronize()
            if number > WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    figures = {name: figures_of(recipes[name], engines[name], seconds[name]) for name in recipes}
    leave()
    return figures


def synthetic_batch(recipe: Recipe, number: int) -> list[dict]:
    """This rank's micro-batches of random tokens, (B, T) each."""
    import torch

    shape = (recipe.train.micro_batch, recipe.train.sequence_length + 1)
    draw = torch.Generator().manual_seed(number)
    batch = []
    for _ in range(recipe.micro_batches):
        text = torch.randint(recipe.model.vocab_size, shape, generator=draw)
        tokens = text[:, :-1].contiguous()
        position = torch.arange(tokens.size(1)).expand_as(tokens).contiguous()
        batch.append({"tokens": tokens, "labels": text[:, 1:].contiguous(), "position_ids": position,
                      "loss_mask": torch.ones(tokens.shape)})
    return batch


def figures_of(recipe: Recipe, engine, seconds: list[float]) -> dict:
    """Median and quartiles of the step time, and the rates that follow from the median."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    executed = training_flops(recipe.model, recipe.train.sequence_length).total * recipe.tokens_per_step
    rate = executed / middle / recipe.parallel.world
    peak = peak_flops(device_name())
    return {
        "sparsity": engine.plan.sparsity,
        "step_seconds": middle,
        "quartiles": [low, high],
        "tokens_per_second": recipe.tokens_per_step / middle,
        "tflops_per_rank": rate / 1e12,
        "mfu": rate / peak if peak else None,
        "state_bytes": engine.state_bytes(),
        "choices": engine.choices,
    }


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"CPU, {len(names)} x {names[0]}" if names else f"CPU, {platform.processor()}"


def circumstances() -> dict:
    """When, on what and with what a figure was measured, and the command."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "device": device_name(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "numpy")},
        "command": shlex.join(["python", *sys.argv]),
    }


def render(report: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines = [f"{report['date']}, {report['device']}, {versions}", f"$ {report['command']}", "",
             f"| {'':<8} | sparsity | step (s), median | quartiles | tokens/s | TFLOP/s | MFU | state (MiB) |",
             "|---|---|---|---|---|---|---|---|"]
    for name, f in report["runs"].items():
        state = sum(f["state_bytes"].values()) / 2**20
        mfu = f"{f['mfu']:.1%}" if f["mfu"] else "-"
        lines.append(f"| {name:<8} | {f['sparsity']:.2%} | {f['step_seconds']:.4f} | "
                     f"{f['quartiles'][0]:.4f} - {f['quartiles'][1]:.4f} | {f['tokens_per_second']:,.0f} | "
                     f"{f['tflops_per_rank']:.3g} | {mfu} | {state:,.1f} |")
    first, last = list(report["runs"].values())[0], list(report["runs"].values())[-1]
    lines += ["", f"step time, sparse over dense: {last['step_seconds'] / first['step_seconds']:.3f}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
