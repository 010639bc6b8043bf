#!/usr/bin/env python3
"""Measures on this machine; nothing is timed in the tests.

    python tools/benchmark.py --suite h200 [--output DIR]
    python tools/benchmark.py page DIR/suite.json [--page FILE.md ...]
    python tools/benchmark.py rates DIR/suite.json [--page FILE.md ...]
    python tools/benchmark.py train [RECIPE] [section.key=value ...] [--steps 20] [--output FILE]
    python tools/benchmark.py step [RECIPE] [section.key=value ...] [--steps 20] [--output FILE]
    torchrun --nproc-per-node 2 tools/benchmark.py step parallel.tensor=2
    python tools/benchmark.py moves [RECIPE] [section.key=value ...] [--steps 20] [--output FILE]
    python tools/benchmark.py save [RECIPE] [section.key=value ...] [--steps 5]
    python tools/benchmark.py kernels [RECIPE] [section.key=value ...] [--output FILE.json]
    python tools/benchmark.py tiles [RECIPE] [section.key=value ...] [--output FILE.json]
    python tools/benchmark.py data FILES... --tokenizer DIR [--workers 1 2] [--megatron-lm DIR]

`--suite`: all that follows but saves and data, for GPT-3 XL on one GPU, in one command of less than
nine minutes; JSON and a Markdown table in DIR. `--suite cpu`, or a machine without a GPU: tiny,
which shows that it runs.
`page`: what the suite measured as tables and a picture in docs/benchmarks, and on pages that have
a place for it.
`rates`: the rates that the planner predicts seconds with, fitted to what the suite measured.
`train`: tokens a second, TFLOP/s, MFU and peak memory of a recipe as it trains, dense beside its
    sparsity, in turn.
`step`: seconds of an optimizer step of a recipe on its engine, dense against its sparsity, both in
one process and their steps in turn, so that what else the machine does hits both alike; medians,
the ratio, and where the time goes. Batches are synthetic.
`moves`: what moves of the masks add to a run: steps with a move beside steps without, in turn in
one process; of the recipe's algorithm, or of SET, RigL and GMP where it has none. Of AC/DC it is
the borders between its dense and sparse parts.
`save`: for how long the loop stands still for a checkpoint that is written behind the steps, and
for one that it waits for, dense and sparse, with the bytes on disk; written to a temporary
directory (TMPDIR) and removed.
`kernels`: expand and compress against the bytes they must move, products of tiles and 2:4 against
dense ones, for the weights of a recipe's first layer; of GPT-3 XL without one, and of something
tiny where there is no GPU.
`tiles`: the same kernels with every tile that is worth a trial, on a GPU; to choose those of
    kernels/tiles.py by.
`data`: MB of text a second of tools/preprocess_data.py by number of workers, and beside it
Megatron-LM's own tool, with a comparison of the tokens; `data --help` has its options. Without a
recipe, a model whose layers fit a CPU's caches as little as a real one's. On a GPU try for example

    python tools/benchmark.py step configs/pretrain/gpt3_xl_s75.yaml \\
        parallel.data=1 train.global_batch=32 --steps 50
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.environment import LIBRARIES, circumstances, publish

from megatron_spdf.command_line import (
    hear_interrupts,
    make_parser,
    output_file,
    path_text,
    positive,
    positive_real,
    refusing,
    say,
)
from megatron_spdf.recipe.load import load_recipe, recipe_values
from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.recipe.words import require_given_once
from megatron_spdf.resilience.world import check_world, find_ranks
from megatron_spdf.tables import Column, Table

DEFAULT = Path(__file__).resolve().parent.parent / "configs/benchmark/cpu.yaml"
PAGES = DEFAULT.parents[2] / "docs/benchmarks"
TILES = DEFAULT.parents[1] / "pretrain/gpt3_xl_s75_tile.yaml"
TINY = ["model.hidden=128", "model.heads=4", "sparsity.pattern=tile", "sparsity.tile=16",
        "train.micro_batch=1"]


@refusing
def main() -> int:
    first = sys.argv[1:2]
    if first == ["page"]:
        return write_pages(sys.argv[2:])
    if first == ["rates"]:
        return fit_rates(sys.argv[2:])
    if first == ["data"]:
        return measure_data(sys.argv[2:])
    if first in (["kernels"], ["tiles"]):
        return measure_kernels(*first, sys.argv[2:])
    if any(word.startswith("--suite") for word in first):
        return measure_suite(sys.argv[1:])
    return measure_recipe()


def measure_recipe() -> int:
    """Steps, training or saves of a recipe, dense and sparse."""
    from benchmarks import moves, save, step, train

    kinds = {"moves": (moves.measure_moves, moves.render_moves),
             "step": (step.measure_steps, step.render_steps),
             "save": (save.measure_saves, save.render_saves),
             "train": (train.measure_training, train.render_training)}
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=list(kinds))
    parser.add_argument("words", nargs="*", metavar="[RECIPE] section.key=value")
    parser.add_argument("--steps", type=positive, default=20,
                        help="measured steps, moves or saves of each run")
    add_output(parser)
    options = parser.parse_intermixed_args()
    if options.steps < 2:
        raise ValueError(f"--steps={options.steps} has no median and no quartiles; take 2 or more")
    path, overrides = split_words(options.words)
    path = path or DEFAULT
    sparse = load_measured(path, overrides)
    if options.what == "moves":
        compared = with_algorithms(sparse, path, overrides, moves.ALGORITHMS)
    else:
        dense = load_measured(path, [*overrides, "sparsity=0.0", "sparsity.rules=[]"])
        compared = {"dense": dense, "sparse": sparse}
    ranks = find_ranks()
    check_world(ranks, sparse.parallel)
    measure, show = kinds[options.what]
    figures = measure(compared, options.steps)
    if ranks.rank == 0:
        publish({**circumstances(), "recipe": sparse.model_dump(), "runs": figures}, show(figures),
                options.output)
    return 0


def measure_suite(arguments: list[str]) -> int:
    """Everything."""
    from benchmarks import suite

    parser = make_parser(suite.__doc__, prog="benchmark.py")
    parser.add_argument("--suite", choices=suite.SCALES, required=True,
                        help="the GPU, of which either has the same sizes; cpu: tiny, to try the "
                             "suite")
    parser.add_argument("--parts", nargs="+", choices=list(suite.PARTS), default=list(suite.PARTS),
                        help="(default: all)")
    parser.add_argument("--output", type=Path, default=Path("runs/suite"), metavar="DIR",
                        help="where suite.json and suite.md go (default: runs/suite)")
    options = parser.parse_args(arguments)
    return suite.run(options.suite, options.parts, options.output)


def write_pages(arguments: list[str]) -> int:
    """Writes pages from the suite's JSON."""
    from benchmarks import page

    parser = make_parser(page.__doc__, prog="benchmark.py page")
    parser.add_argument("reports", nargs="+", type=Path, metavar="SUITE.json")
    parser.add_argument("--directory", type=Path, default=PAGES, metavar="DIR",
                        help="where tables and picture go (default: docs/benchmarks)")
    parser.add_argument("--page", type=Path, nargs="+", default=[], metavar="FILE",
                        help="Markdown pages that have lines <!-- gpu --> and <!-- end of gpu -->")
    options = parser.parse_args(arguments)
    say("\n".join(map(str, page.render_pages(options.reports, options.directory, options.page))))
    return 0


def fit_rates(arguments: list[str]) -> int:
    """Fits the planner's rates to the suite's JSON."""
    from benchmarks import rates

    parser = make_parser(rates.__doc__, prog="benchmark.py rates")
    parser.add_argument("reports", nargs="+", type=Path, metavar="SUITE.json")
    parser.add_argument("--output", type=output_file, default=rates.FILE, metavar="FILE",
                        help="(default: the planner's own)")
    parser.add_argument("--page", type=Path, nargs="+", default=[], metavar="FILE",
                        help="Markdown pages that have lines <!-- rates --> and <!-- end of rates "
                             "-->")
    options = parser.parse_args(arguments)
    found = rates.write_rates(options.reports, options.page, options.output)
    say(Table([Column("rate"), Column("value")], list(rates.rates_rows(found))).text())
    return 0


def measure_data(arguments: list[str]) -> int:
    """Preprocessing, in a temporary directory."""
    from benchmarks import data_throughput

    parser = make_parser(data_throughput.__doc__, prog="benchmark.py data")
    parser.add_argument("inputs", nargs="+", type=path_text, metavar="FILE",
                        help="shards, as tools/preprocess_data.py takes them")
    parser.add_argument("--tokenizer", type=Path, required=True,
                        help="directory of GPT-2 BPE files")
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2], metavar="N",
                        help="(default: 1 2)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N",
                        help="of all tools in turn (default: 3)")
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR",
                        help="a checkout, of the release that "
                        f"megatron-core {version('megatron-core')} is of; its tool needs triton, "
                        "on a CPU too")
    add_output(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as place:
        figures = data_throughput.measure(options.inputs, options.tokenizer, options.workers,
                                          options.rounds,
                                     Path(place), options.megatron_lm)
    libraries = ("megatron-core", "numpy", "tiktoken", "tokenizers", "transformers")
    publish({**circumstances(libraries), **figures}, data_throughput.render(figures),
            options.output)
    return 0


def measure_kernels(what: str, arguments: list[str]) -> int:
    """Kernels on the weights of one layer, as they are or cut up in every way."""
    import torch
    from benchmarks import kernel_throughput, tiles

    from megatron_spdf.sparsity.plan import Plan

    module = kernel_throughput if what == "kernels" else tiles
    parser = make_parser(module.__doc__, prog=f"benchmark.py {what}")
    parser.add_argument("words", nargs="*", metavar="[RECIPE] section.key=value")
    parser.add_argument("--seconds", type=positive_real, default=0.2,
                        help="that each measurement takes at least")
    add_output(parser)
    options = parser.parse_intermixed_args(arguments)
    path, overrides = split_words(options.words)
    if not path:
        path = TILES if torch.cuda.is_available() else DEFAULT
        overrides = overrides if torch.cuda.is_available() else [*TINY, *overrides]
    recipe = load_measured(path, overrides)
    report = {**circumstances((*LIBRARIES[::2], "triton")), "recipe": recipe.model_dump()}
    if what == "kernels":
        figures = kernel_throughput.measure(recipe, Plan.of(recipe), options.seconds)
        publish({**report, **figures}, kernel_throughput.render(figures), options.output)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = tiles.measure(recipe, Plan.of(recipe), device, options.seconds)
        publish({**report, "tiles": rows}, tiles.render(rows), options.output)
    return 0


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=output_file,
                        help="write the figures as JSON, with date, hardware and versions")


def load_measured(path: str, overrides: list[str]) -> Recipe:
    """The recipe.

    Raises:
        ValueError: it is none, or leaves open what would be measured.
    """
    if "task" in (recipe_values(path).get("data") or {}):
        raise ValueError(f"{path} is a fine-tuning recipe, whose model is that of its checkpoint, "
                         "and a benchmark is of a pre-training recipe; name one, and for the steps "
                         "of fine-tuning add engine=deepspeed")
    recipe = load_recipe(path, overrides)
    if recipe.distill.on:
        raise ValueError(f"distill.teacher={recipe.distill.teacher} would run beside every step, "
                         "and a benchmark loads no teacher; add distill.weight=0")
    if recipe.train.micro_batch == AUTO:
        raise ValueError("train.micro_batch=auto lets a run try sizes at its start; a benchmark is "
                         "of one, give train.micro_batch=N")
    return recipe


def with_algorithms(recipe: Recipe, path: str, overrides: list[str],
                    names: Sequence[str]) -> dict[str, Recipe]:
    """The recipe by the name of its mask algorithm; where masks stay, with each of these."""
    if not recipe.sparsity.update.stays:
        return {recipe.sparsity.algorithm: recipe}
    return {name: load_measured(path, [*overrides, f"sparsity.algorithm={name}"])
            for name in names}


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if one is named, and the `section.key=value` words.

    Raises:
        ValueError: several recipes, or a key that is given twice.
    """
    named, overrides = ([w for w in words if ("=" in w) == sets] for sets in (False, True))
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are {len(named)} recipes; name one, and changes "
                         "as section.key=value")
    require_given_once(overrides)
    return (named[0] if named else None), overrides


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
