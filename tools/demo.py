#!/usr/bin/env python3
"""Sparse pre-training end to end on this machine, without a download: `make demo`.

The sources of the running Python's standard library become Pile-format shards, a tokenizer is trained on them, and
the same small GPT is pre-trained dense and with 75% of its block weights at zero, on two tensor-parallel ranks. It
ends with a table and a plot of both loss curves against training FLOPs.

    python tools/demo.py [--output runs/demo] [section.key=value ...]
"""

from __future__ import annotations

import _path  # noqa: F401  isort: skip  (first: puts the package on the path)

import argparse
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from statistics import mean, median

import zstandard

from megatron_spdf.config import load_recipe
from megatron_spdf.model.weights import model_weights, padded_vocab
from megatron_spdf.sparsity.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs/pretrain/demo.yaml"
LEVELS = {"dense": 0.0, "75% sparse": 0.75}
VALIDATION_SHARE = 16  # one document in so many


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="everything goes there; made anew")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    options = parser.parse_args()
    started = time.perf_counter()
    shutil.rmtree(options.output, ignore_errors=True)
    prepare_data(options.output)
    runs = {name: train(options.output, name, level, options.overrides) for name, level in LEVELS.items()}
    print("\n" + (table := render_table(runs)))
    (options.output / "table.txt").write_text(table + "\n")
    plot = options.output / "loss.png"
    plot_losses(runs, plot)
    print(f"\nplot: {plot}\nruns: {', '.join(str(r['directory']) for r in runs.values())}\n"
          f"done in {time.perf_counter() - started:.0f} s")
    return 0


def prepare_data(output: Path) -> None:
    """Shards, tokenizer and indexed data sets under `output`."""
    shards = output / "shards"
    count, size = write_shards(shards)
    print(f"corpus: {count:,} modules of Python's standard library, {size / 1e6:.1f} MB, in {shards}/*.jsonl.zst")
    tool = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--tokenizer", str(output / "tokenizer")]
    vocabulary = str(load_recipe(RECIPE).model.vocab_size)
    run([*tool, "--input", f"{shards}/train-*.jsonl.zst", "--output", str(output / "data/train"),
         "--train-tokenizer", "bpe", "--vocab-size", vocabulary])
    run([*tool, "--input", f"{shards}/valid.jsonl.zst", "--output", str(output / "data/valid")])


def write_shards(directory: Path, count: int = 4) -> tuple[int, int]:
    """The standard library's modules as Pile-format JSON lines; returns documents and bytes of text."""
    directory.mkdir(parents=True)
    names = [f"train-{i}" for i in range(count)] + ["valid"]
    files = {n: zstandard.ZstdCompressor(3).stream_writer((directory / f"{n}.jsonl.zst").open("wb")) for n in names}
    lines = {n: io.TextIOWrapper(f, encoding="utf-8") for n, f in files.items()}
    documents = size = 0
    for name, text in standard_library():
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        shard = "valid" if digest % VALIDATION_SHARE == 0 else f"train-{digest // VALIDATION_SHARE % count}"
        record = {"text": text, "meta": {"pile_set_name": "Python standard library", "path": name}}
        lines[shard].write(json.dumps(record, ensure_ascii=False) + "\n")
        documents, size = documents + 1, size + len(text.encode())
    for stream in lines.values():
        stream.close()
    return documents, size


def standard_library():
    """(module path, source) of every module, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in {"site-packages", "dist-packages", "test", "tests", "idle_test"} for part in name.split("/")):
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def train(output: Path, name: str, level: float, overrides: list[str]) -> dict:
    """Pre-trains at one sparsity on the recipe's ranks; returns what its log and checkpoint say."""
    directory = output / name.replace("% ", "_")
    words = [f"output={directory}", f"data.train={output}/data/train", f"data.valid={output}/data/valid",
             *overrides, f"sparsity={level}"]
    recipe = load_recipe(RECIPE, words)
    print(f"\n{name}:")
    run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(recipe.parallel.world),
         str(ROOT / "pretrain.py"), str(RECIPE), *words])
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "valid", "bytes")}
    return {"directory": directory, "recipe": recipe, **of}


def run(command: list[str]) -> None:
    """Runs a command as a user would type it, showing it; its output goes to the terminal."""
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    print(f"$ {shlex.join(c.replace(str(ROOT) + '/', '') for c in command)}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"})


def render_table(runs: dict[str, dict]) -> str:
    """The runs side by side, with the ratio of the last to the first."""
    rows: dict[str, list[float]] = {}
    for entry in runs.values():
        recipe, last, held = entry["recipe"], entry["train"][-1], entry["bytes"][0]
        plan = make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups)
        losses = [r["loss"] for r in entry["train"]]
        state = held["parameters"] + held["gradients"] + held["optimizer"]
        for label, value in {
            "parameters, active (M)": active_parameters(recipe, plan) / 1e6,
            "training loss, mean of the last tenth": mean(losses[-max(1, len(losses) // 10):]),
            "validation perplexity": entry["valid"][-1]["perplexity"],
            "tokens/s, median": median(r["tokens_per_second"] for r in entry["train"]),
            "training FLOPs (1e12)": last["flops"] / 1e12,
            "weights + gradients + optimizer, rank 0 (MiB)": state / 2**20,
            "sent per step by rank 0, tensor parallel (MiB)": held["sent_per_step"] / 2**20,
            "sent per step and data-parallel rank* (MiB)": 2 * held["gradients"] / 2**20,
            "checkpoint on disk (MiB)": checkpoint_bytes(entry["directory"]) / 2**20,
        }.items():
            rows.setdefault(label, []).append(value)
    head = f"{'':<48}" + "".join(f"{name:>14}" for name in runs) + f"{'ratio':>9}"
    lines = [f"{label:<48}" + "".join(f"{v:>14,.2f}" for v in values) + f"{values[-1] / values[0]:>9.3f}"
             for label, values in rows.items()]
    note = ("* computed from the gradient buffers: gradients reduced and parameters gathered once a step, were there\n"
            "  more than one replica. Embeddings, norms and biases are dense, and large in a model this small.")
    return "\n".join([head, "-" * len(head), *lines, note])


def active_parameters(recipe, plan) -> int:
    """Parameters that are not held at zero, without the padding of the vocabulary."""
    total = sum(w.numel for w in model_weights(recipe.model))
    padding = (padded_vocab(recipe.model) - recipe.model.vocab_size) * recipe.model.hidden
    return total - padding - plan.numel + plan.active


def checkpoint_bytes(directory: Path) -> int:
    newest = max((directory / "checkpoints").iterdir())
    return sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())


def plot_losses(runs: dict[str, dict], path: Path) -> None:
    """Training and validation loss of every run against its training FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=140)
    for name, entry in runs.items():
        flops = {r["step"]: r["flops"] / 1e12 for r in entry["train"]}
        (line,) = axes.plot(flops.values(), [r["loss"] for r in entry["train"]], alpha=0.35)
        valid = [r for r in entry["valid"] if r["step"] in flops]
        axes.plot([flops[r["step"]] for r in valid], [r["loss"] for r in valid], "o-", color=line.get_color(),
                  label=name)
    axes.set(xlabel="training FLOPs (1e12)", ylabel="loss (nats per token)",
             title="Pre-training on Python's standard library: line training, points validation")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
