#!/usr/bin/env python3
"""What a run will cost, fit in and be worth, before it starts.

    python tools/plan.py RECIPE [section.key=value ...] --gpu h100 --gpus 64
                                                  FLOPs, bytes, traffic, time, layouts
    python tools/plan.py RECIPE [section.key=value ...] --exact
                                                  real buffers, built without hardware
    python tools/plan.py iso-flop RECIPE [section.key=value ...] --sparsity 0.75
                                                  wider sparse models of the same FLOPs
    python tools/plan.py fit RUNS...              the scaling law of your own runs
    python tools/plan.py fit losses.csv --form all
                                                  that of a grid's table of losses, in every form
    python tools/plan.py law [--plot FILE.png]    the published law of sparse models

Exit code 0, or 2 with a sentence on what to change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_spdf.command_line import (
    end_quietly,
    make_parser,
    number,
    output_file,
    output_picture,
    positive,
    positive_real,
    refusing,
    say,
)
from megatron_spdf.files import write_file
from megatron_spdf.planning.exact import dry_run, ranks_of_interest, render_counts
from megatron_spdf.planning.hardware import GPUS, THIS_MACHINE, find_gpu
from megatron_spdf.planning.iso_flop import describe_variants, render_variants, variants
from megatron_spdf.planning.overview import Request, make_overview
from megatron_spdf.planning.rates import MEASURED
from megatron_spdf.planning.render import render_overview
from megatron_spdf.planning.search import LARGEST_WORLD
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.recipe.words import add_overrides
from megatron_spdf.records.json_writer import to_json
from megatron_spdf.reports.plan_page import render_plan_page
from megatron_spdf.runs.calibrate import calibrate, measured_step
from megatron_spdf.runs.law_points import of_one_algorithm, trainings
from megatron_spdf.runs.measured import read_run
from megatron_spdf.scaling_law.fit import fit_law, shortcomings
from megatron_spdf.scaling_law.forms import FORMS
from megatron_spdf.scaling_law.law import CAVEAT, PUBLISHED, describe_law, plot_contours, render_law
from megatron_spdf.scaling_law.points import render_points
from megatron_spdf.scaling_law.render import render_fit
from megatron_spdf.section import parse_count
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.text import counted

ALL = "all"


@refusing
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"iso-flop": iso_flop, "fit": fit, "law": law}
    command = commands.get(arguments[0]) if arguments else None
    return command(arguments[1:]) if command else plan(arguments)


def plan(arguments: list[str]) -> int:
    """The overview of a recipe on so many GPUs, or its exact dry run."""
    options = _plan_parser().parse_intermixed_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.train.micro_batch == AUTO:
        recipe = recipe.with_micro_batch(1)  # of the recipe's own layout; a search tries all
    sparsity = Plan.of(recipe)
    if options.exact:
        if options.gpus not in (None, recipe.parallel.world):
            raise ValueError("--exact builds the recipe's own layout, of "
                             f"{counted(recipe.parallel.world, 'rank')}, not --gpus "
                             f"{options.gpus}; set parallel.tensor=, parallel.pipeline= and "
                             "parallel.data=")
        counts = dry_run(recipe, sparsity, options.rank or ranks_of_interest(recipe))
        print(to_json([asdict(c) for c in counts], indent=1) if options.json
              else render_counts(recipe, counts))
        return 0
    if options.gpu is None:
        raise ValueError(f"which GPU? Say --gpu and one of {', '.join(GPUS)}, or --gpu "
                         f"{THIS_MACHINE} to measure it")
    gpus = recipe.parallel.world if options.gpus is None else options.gpus
    gpu = find_gpu(options.gpu, recipe.train.precision, options.memory and options.memory * 2**30,
                   options.network and options.network * 1e9, options.gpus_per_node)
    efficiency = options.efficiency
    source = "given" if efficiency else f"measured on {MEASURED.source.partition(',')[0]}"
    if options.calibrate:
        run = read_run(options.calibrate)
        efficiency = calibrate(run, gpu)
        source = f"as in {options.calibrate}: {measured_step(run):.4g} s a step"
    facts = make_overview(Request(recipe, sparsity, gpu, gpus, efficiency, source, options.price,
                                  options.top))
    if options.html:
        write_file(options.html, render_plan_page(facts, str(options.recipe)))
    say(_rendered(recipe, sparsity, facts, options.json))
    return 0


def _rendered(recipe: Recipe, sparsity: Plan, facts: dict[str, Any], as_json: bool) -> str:
    """The overview, and rates and spreads by group where they differ."""
    # with PyTorch, without which the planner goes
    from megatron_spdf.model.parametrization import group_rows, render_parametrization

    weights = recipe.model.weights()
    groups = render_parametrization(recipe, sparsity, weights)
    if as_json:
        rows = {"groups": group_rows(recipe, sparsity, weights)} if groups else {}
        return to_json({**facts, **rows}, indent=1)
    return "\n\n".join(filter(None, [render_overview(facts), groups]))


def _plan_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("recipe",
                        help="YAML file, see configs/; its layout is one among those tried")
    add_overrides(parser)
    parser.add_argument("--gpus", type=number(int, least=1, most=LARGEST_WORLD), metavar="N",
                        help="how many (default: the recipe's layout)")
    parser.add_argument("--gpu", metavar="NAME",
                        help=f"{', '.join(GPUS)}, or {THIS_MACHINE}, which is measured")
    parser.add_argument("--price", type=number(float, least=0.0), metavar="P",
                        help="of a GPU hour; adds the cost, in the same currency")
    parser.add_argument("--memory", type=positive_real, metavar="GIB",
                        help="of a GPU, in place of the table's")
    parser.add_argument("--network", type=positive_real, metavar="GB/S",
                        help="of a GPU to other nodes, likewise")
    parser.add_argument("--gpus-per-node", type=positive, metavar="N",
                        help="in place of the table's")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--efficiency", type=number(float, above=0.0, most=1.0), metavar="E",
                       help="of dense products, share of the peak; the host then counts as nothing "
                            f"(default: as measured, {MEASURED.products:.2f})")
    speed.add_argument("--calibrate", type=Path, metavar="RUN", help="take it from this run's log")
    parser.add_argument("--top", type=positive, default=8, metavar="N",
                        help="layouts shown (default: 8)")
    parser.add_argument("--exact", action="store_true",
                        help="build ranks of the recipe's layout on the meta device and count what "
                             "they hold")
    parser.add_argument("--rank", type=number(int, least=0), action="append", metavar="R",
                        help="with --exact: this rank, may be repeated (default: one of each kind "
                             "of stage)")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.add_argument("--html", type=output_file, metavar="FILE",
                        help="write a page with plots too")
    return parser


def iso_flop(arguments: list[str]) -> int:
    """Sparse-IFT's families beside a dense recipe."""
    parser = make_parser("Sparse models with the FLOPs of a dense recipe, as overrides of it: "
                         "Sparse-IFT (Saxena et al. 2023).", prog="plan.py iso-flop")
    parser.add_argument("recipe", help="YAML file of a dense run, see configs/")
    add_overrides(parser)
    parser.add_argument("--sparsity", type=number(float, above=0.0, below=1.0), required=True,
                        metavar="S", help="of the grown layers, in (0, 1)")
    parser.add_argument("--tensor", type=positive, metavar="N",
                        help="tensor-parallel ranks that must divide heads and widths (default: "
                             "the recipe's, and those up to 8 that divide the dense model)")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    options = parser.parse_intermixed_args(arguments)
    given = options.overrides

    def load(words: Sequence[str]) -> Recipe:
        return load_recipe(options.recipe, [*given, *words])

    found = variants(load(()), options.sparsity, load, options.tensor)
    facts = describe_variants(found, options.recipe, given)
    say(to_json(facts, indent=1) if options.json else render_variants(facts))
    return 0


def fit(arguments: list[str]) -> int:
    """Fits laws to finished runs."""
    options = _fit_parser().parse_args(arguments)
    trained = trainings(options.runs, options.hold_out)
    points = [each.point for each in trained]
    if not options.json:
        print(render_points(points))
    fits = []
    for name in FORMS if options.form == ALL else [options.form]:
        own = (of_one_algorithm(trained, options.algorithm) if name == "published" else trained)
        rest, held_out = ([each.point for each in own if each.held_out is held]
                          for held in (False, True))
        if options.form == ALL and (missing := shortcomings(rest, FORMS[name])):
            say(f"the form {name} is left out: {'; '.join(missing)}", sys.stderr)
            continue
        fits.append(fit_law(rest, options.starts, options.bootstrap, form=FORMS[name],
                            held_out=held_out))
        if not options.json:
            print(f"\n{render_fit(fits[-1])}")
    if not fits:
        raise ValueError("no form of the law is determined by these runs; add some, see above")
    if options.json:
        plain = [each.as_plain() for each in fits]
        said = {"forms": plain} if options.form == ALL else plain[0]
        print(to_json({**said, "points": [asdict(p) for p in points]}, indent=1))
    return 0


def _fit_parser() -> argparse.ArgumentParser:
    parser = make_parser("The scaling law of sparse models fitted to your own finished runs: at "
                         "least seven, with three different sparsities, sizes and lengths.",
                         prog="plan.py fit")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run directories, or tables of losses that tools/experiment.py wrote")
    parser.add_argument("--form", choices=[*FORMS, ALL], default="published",
                        help="of the law: the paper's (default); by the average number of weights "
                             "over training; a factor for each algorithm and sparsity; or all")
    parser.add_argument("--algorithm", metavar="NAME",
                        help="whose sparse runs the published form is fitted to, beside dense "
                             "ones (default: static, where there are several)")
    parser.add_argument("--hold-out", action="append", default=[], metavar="TEXT",
                        help="predict runs with this in their name instead of fitting to them, "
                             "beside those that a table marks; may be repeated")
    parser.add_argument("--starts", type=positive, default=32, metavar="N",
                        help="random starting points (default: 32)")
    parser.add_argument("--bootstrap", type=positive, default=100, metavar="N",
                        help="resamplings (default: 100)")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser


def law(arguments: list[str]) -> int:
    """Values of a published law."""
    parser = make_parser(f"The published scaling laws of sparse models. {CAVEAT}",
                         prog="plan.py law")
    parser.add_argument("--fit", choices=sorted(PUBLISHED), default="t5",
                        help="which of the two (default: t5)")
    parser.add_argument("--nonzero", type=_count, default=10**8, metavar="N",
                        help="non-zero linear weights")
    parser.add_argument("--compute", type=positive_real, default=1e21, metavar="C",
                        help="training FLOPs (default: 1e21)")
    parser.add_argument("--plot", type=output_picture, metavar="FILE.png",
                        help="iso-FLOP curves and contours of the optimum")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    options = parser.parse_args(arguments)
    facts = describe_law(PUBLISHED[options.fit], options.fit, options.nonzero, options.compute)
    print(to_json({**facts, "caution": CAVEAT}, indent=1) if options.json else render_law(facts))
    if options.plot:
        plot_contours(PUBLISHED[options.fit], options.fit, options.plot)
        if not options.json:
            print(f"plot: {options.plot}")
    return 0


def _count(text: str) -> int:
    value = parse_count(text)
    if not isinstance(value, int) or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no positive count; write for example "
                                         "100M or 1e8")
    return value


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
