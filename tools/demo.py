#!/usr/bin/env python3
"""Sparse pre-training, dense fine-tuning, end to end on this machine, without a download: `make
demo`.

The sources of the running Python's standard library become Pile-format shards, a tokenizer is
trained on them, and the same small GPT is pre-trained dense and with 75% of its linear weights at
zero, on two tensor-parallel ranks. Both are then fine-tuned on a synthetic table-to-text set,
dense, and the sparse one with its mask kept too, and scored. It ends with a table of each mode, a
plot of the losses against training FLOPs, and a report page.

    python tools/demo.py [--output runs/demo] [section.key=value ...]
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo_parts.corpus import write_shards
from demo_parts.functions import write_functions
from demo_parts.tables import fine_tuning_table, plot_losses, pretraining_table

from megatron_spdf.command_line import add_overrides, make_parser
from megatron_spdf.files import write_file
from megatron_spdf.recipe.finetune import load_finetune
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.reports.runs import read_all

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs/pretrain/demo.yaml"
FINETUNE = ROOT / "configs/finetune/demo.yaml"
LEVELS = {"dense": 0.0, "75% sparse": 0.75}
MODES = {"dense": ["dense"], "75% sparse": ["dense", "sparse"]}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"),
                        help="everything goes there; made anew")
    add_overrides(parser, "changes to the pre-training recipe")
    options = parser.parse_args()
    started, output = time.perf_counter(), options.output
    shutil.rmtree(output, ignore_errors=True)
    prepare_data(output)
    pretrained = {name: pretrain(output, name, level, options.overrides) for name,
                  level in LEVELS.items()}
    tuned = [finetune(output, pretrained[name], mode) for name in LEVELS for mode in MODES[name]]
    directories = [*pretrained.values(), *tuned]
    logged = read_all(directories)
    runs = dict(zip(pretrained, logged, strict=False))
    tables = f"{pretraining_table(runs)}\n\n{fine_tuning_table(logged)}"
    write_file(output / "tables.txt", tables + "\n")
    plot_losses(runs, output / "loss.png")
    run([sys.executable, str(ROOT / "tools/report.py"), *map(str, directories), "-o",
         str(output / "report.html")])
    print(
        f"\n{tables}\n\nplot: {output / 'loss.png'}\npage: {output / 'report.html'}\n"
        f"runs: {', '.join(map(str, directories))}\ndone in {time.perf_counter() - started:.0f} s"
    )
    return 0


def prepare_data(output: Path) -> None:
    """Shards, tokenizer, indexed data sets and the table-to-text set, under `output`."""
    shards = output / "shards"
    count, size = write_shards(shards)
    print(f"corpus: {count:,} modules of Python's standard library, {size / 1e6:.1f} MB, in "
          f"{shards}/*.jsonl.zst")
    lines = write_functions(output / "functions")
    print(f"table-to-text: {', '.join(f'{n:,} {split}' for split, n in lines.items())} lines, in "
          f"{output}/functions")
    tool = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--tokenizer",
            str(output / "tokenizer")]
    vocabulary = str(load_recipe(RECIPE).model.vocab_size)
    run([*tool, "--input", f"{shards}/train-*.jsonl.zst", "--output", str(output / "data/train"),
         "--train-tokenizer", "bpe", "--vocab-size", vocabulary])
    run([*tool, "--input", f"{shards}/valid.jsonl.zst", "--output", str(output / "data/valid")])


def pretrain(output: Path, name: str, level: float, overrides: list[str]) -> Path:
    """Pre-trains at one sparsity on the recipe's ranks; returns the run's directory."""
    directory = output / name.replace("% ", "_")
    words = [f"output={directory}", f"data.train={output}/data/train",
             f"data.valid={output}/data/valid", *overrides, f"sparsity={level}"]
    print(f"\npre-training, {name}:")
    torchrun(load_recipe(RECIPE, words).parallel.world, "pretrain.py", str(RECIPE), *words)
    return directory


def finetune(output: Path, start: Path, mode: str) -> Path:
    """Fine-tunes from a pre-training run, decodes and scores; returns the run's directory."""
    directory = output / f"{start.name}_tuned_{mode}"
    words = [f"checkpoint={start}", f"output={directory}", f"data.path={output}/functions",
             f"mode={mode}"]
    print(f"\n{mode} fine-tuning of {start}:")
    torchrun(load_finetune(FINETUNE, words).parallel.world, "finetune.py", str(FINETUNE), *words)
    torchrun(2, "tools/evaluate.py", str(directory), "--task", "jsonl", "--data",
             str(output / "functions"),
             "--beams", "4", "--no-repeat-ngram", "0")
    return directory


def torchrun(ranks: int, script: str, *words: str) -> None:
    run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
         str(ROOT / script), *words])


def run(command: list[str]) -> None:
    """Runs a command as a user would type it, showing it; its output goes to the terminal."""
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    print(f"$ {shlex.join(c.replace(str(ROOT) + '/', '') for c in command)}", flush=True)
    subprocess.run(command, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"})


if __name__ == "__main__":
    sys.exit(main())
