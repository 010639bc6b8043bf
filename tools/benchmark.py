#!/usr/bin/env python3
"""Measures on this machine; nothing is timed in the tests.

    python tools/benchmark.py step [RECIPE] [section.key=value ...] [--steps 20] [--output FILE.json]
    torchrun --nproc-per-node 2 tools/benchmark.py step parallel.tensor=2
    python tools/benchmark.py save [RECIPE] [section.key=value ...] [--steps 5]
    python tools/benchmark.py kernels [RECIPE] [section.key=value ...] [--output FILE.json]
    python tools/benchmark.py data FILES... --tokenizer DIR [--workers 1 2] [--megatron-lm DIR]

`step`: seconds of an optimizer step of a recipe, dense against its sparsity, both engines in one process and their
steps in turn, so that what else the machine does hits both alike; medians and the ratio. Batches are synthetic.
`save`: for how long the loop stands still for a checkpoint that is written behind the steps, and for one that it waits
for, dense and sparse, with the bytes on disk; written to a temporary directory (TMPDIR) and removed.
`kernels`: expand and compress against the bytes they must move, products with blocks against dense ones, for the
weights of a recipe's first layer; of GPT-3 XL without one, and of something tiny where there is no GPU.
`data`: MB of text a second of tools/preprocess_data.py by number of workers, and beside it Megatron-LM's own tool, with
a comparison of the tokens; `data --help` has its options.
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
import shutil
import statistics
import sys
import tempfile
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
BLOCKS = DEFAULT.parents[1] / "pretrain/gpt3_xl_s75_block.yaml"
TINY = ["model.hidden=128", "model.heads=4", "sparsity.pattern=block", "sparsity.block=16", "train.micro_batch=1"]
WARM_UP = 2


def main() -> int:
    if sys.argv[1:2] == ["data"]:
        return measure_data(sys.argv[2:])
    if sys.argv[1:2] == ["kernels"]:
        return measure_kernels(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "save"])
    parser.add_argument("words", nargs="*", metavar="[RECIPE] section.key=value")
    parser.add_argument("--steps", type=int, default=20, help="measured steps, or saves, of each run")
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
    measure, show = {"step": (measure_steps, render_steps), "save": (measure_saves, render_saves)}[options.what]
    figures = measure({"dense": dense, "sparse": sparse}, options.steps)
    if ranks.rank == 0:
        report = {**circumstances(), "recipe": sparse.model_dump(), "runs": figures}
        print("\n".join([*render_circumstances(report), *show(figures)]))
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure_data(arguments: list[str]) -> int:
    """Preprocessing, in a temporary directory."""
    from megatron_spdf.data import throughput

    parser = argparse.ArgumentParser(prog="benchmark.py data", description=throughput.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="FILE", help="shards, as tools/preprocess_data.py takes them")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of GPT-2 BPE files")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all tools in turn (default: 3)")
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="a checkout, of the release that "
                        f"megatron-core {version('megatron-core')} is of; its tool needs triton, on a CPU too")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, with date, hardware and versions")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark_data_") as place:
            figures = throughput.measure(options.inputs, options.tokenizer, options.workers, options.rounds,
                                         Path(place), options.megatron_lm)
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    report = {**circumstances(("megatron-core", "numpy", "tiktoken", "tokenizers", "transformers")), **figures}
    print("\n".join([*render_circumstances(report), *throughput.render(figures)]))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure_kernels(arguments: list[str]) -> int:
    """Kernels on the weights of one layer."""
    import torch

    from megatron_spdf.sparsity import throughput

    parser = argparse.ArgumentParser(prog="benchmark.py kernels", description=throughput.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="[RECIPE] section.key=value")
    parser.add_argument("--seconds", type=float, default=0.2, help="that each measurement takes at least")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, with date, hardware and versions")
    options = parser.parse_intermixed_args(arguments)
    named, overrides = ([w for w in options.words if ("=" in w) == sets] for sets in (False, True))
    path = named[0] if named else BLOCKS if torch.cuda.is_available() else DEFAULT
    if not named and path == DEFAULT:
        overrides = [*TINY, *overrides]
    try:
        recipe = load_recipe(path, overrides)
    except ValueError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    plan = make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups)
    figures = throughput.measure(recipe, plan, options.seconds)
    report = {**circumstances(("torch", "numpy")), "recipe": recipe.model_dump(), **figures}
    print("\n".join([*render_circumstances(report), *throughput.render(figures)]))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def build_engines(recipes: dict[str, Recipe]) -> dict:
    """Joins the ranks and builds the engine of every recipe in this process."""
    cpu.install()
    from megatron_spdf.engine.megatron import MegatronEngine

    device = join(find_ranks(), next(iter(recipes.values())))
    return {name: MegatronEngine(
        recipe, make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups), device)
        for name, recipe in recipes.items()}


def measure_steps(recipes: dict[str, Recipe], steps: int) -> dict[str, dict]:
    """Runs the recipes' engines step by step in turn; returns the figures of each."""
    engines, seconds = build_engines(recipes), {name: [] for name in recipes}
    import torch

    first = next(iter(recipes.values()))
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


def measure_saves(recipes: dict[str, Recipe], saves: int) -> dict[str, dict]:
    """Saves every engine's state after each step, waiting and behind the steps in turn; medians, in seconds."""
    engines = build_engines(recipes)
    import torch.distributed as dist

    from megatron_spdf.checkpoint import store
    from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState

    place = [tempfile.mkdtemp(prefix="benchmark_save_") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(place)
    figures = {}
    for name, engine in engines.items():
        checkpointer = Checkpointer(Path(place[0]) / name, recipes[name], engine.plan, NoTokenizer())
        stalls, written = {"waiting": [], "behind": []}, []
        for number in range(1, 2 * saves + 1):
            batch = synthetic_batch(recipes[name], number)
            engine.step(batch, number, number * recipes[name].tokens_per_step, False)
            way = "waiting" if number % 2 else "behind"
            started = time.perf_counter()
            checkpointer.save(engine, RunState(number), engine.measured_sparsity())
            saving = checkpointer.wait() if way == "waiting" else None
            stalls[way].append(time.perf_counter() - started)
            saving = saving or checkpointer.wait()
            if saving.error:
                raise saving.error
            written.append(saving.seconds)
        bytes_on_disk = sum((saving.path / file).stat().st_size for file in store.files_of(saving.path))
        figures[name] = {"sparsity": engine.plan.sparsity, "bytes_on_disk": bytes_on_disk,
                         "write_seconds": statistics.median(written),
                         **{f"stall_seconds_{way}": statistics.median(stalls[way]) for way in stalls}}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place[0])
    leave()
    return figures


class NoTokenizer:
    """Stands where a checkpoint keeps the tokenizer; batches are synthetic."""

    kind, sha256 = "none", ""

    def save(self, directory: Path) -> None:
        directory.mkdir()


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
    skipped = engine.plan.on_blocks if engine.device.type == "cuda" else None
    executed = training_flops(recipe.model, recipe.train.sequence_length, skipped).total * recipe.tokens_per_step
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


def circumstances(libraries: tuple[str, ...] = ("torch", "megatron-core", "numpy")) -> dict:
    """When, on what and with what a figure was measured, and the command."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "device": device_name(),
        "versions": {name: version(name) for name in libraries},
        "command": shlex.join(["python", *sys.argv]),
    }


def render_circumstances(report: dict) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return [f"{report['date']}, {report['device']}, {versions}", f"$ {report['command']}", ""]


def render_steps(runs: dict[str, dict]) -> list[str]:
    lines = [f"| {'':<8} | sparsity | step (s), median | quartiles | tokens/s | TFLOP/s | MFU | state (MiB) |",
             "|---|---|---|---|---|---|---|---|"]
    for name, f in runs.items():
        state = sum(f["state_bytes"].values()) / 2**20
        mfu = f"{f['mfu']:.1%}" if f["mfu"] else "-"
        lines.append(f"| {name:<8} | {f['sparsity']:.2%} | {f['step_seconds']:.4f} | "
                     f"{f['quartiles'][0]:.4f} - {f['quartiles'][1]:.4f} | {f['tokens_per_second']:,.0f} | "
                     f"{f['tflops_per_rank']:.3g} | {mfu} | {state:,.1f} |")
    return [*lines, "", "step time, sparse over dense: "
            f"{runs['sparse']['step_seconds'] / runs['dense']['step_seconds']:.3f}"]


def render_saves(runs: dict[str, dict]) -> list[str]:
    lines = [f"| {'':<8} | sparsity | stall, written behind (s) | stall, waited for (s) | writing (s) | disk (MiB) |",
             "|---|---|---|---|---|---|"]
    for name, f in runs.items():
        lines.append(f"| {name:<8} | {f['sparsity']:.2%} | {f['stall_seconds_behind']:.4f} | "
                     f"{f['stall_seconds_waiting']:.4f} | {f['write_seconds']:.4f} | "
                     f"{f['bytes_on_disk'] / 2**20:,.1f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
