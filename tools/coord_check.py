#!/usr/bin/env python3
"""Are activations the same size at every width and sparsity? Flat under `parametrization: mup`, not
under `standard`.

    python tools/coord_check.py configs/pretrain/gpt_10m.yaml data.train=data/train -o C.png

The recipe's model is trained for a few steps, at each width dense, and at the base width at each
sparsity, with both parametrizations; the heads keep their size. Prints, for each part of the model,
the slope of log2 size over log2 width and over log2 density at the last step: 0 is flat. Exit code
0, or 2 for what the user can put right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from megatron_spdf.command_line import (
    hear_interrupts,
    make_parser,
    number,
    output_picture,
    positive,
    refusing,
)
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.words import add_overrides
from megatron_spdf.records.json_writer import to_json
from megatron_spdf.tables import Column, Table

RULES = ("standard", "mup")


@refusing
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    found = check(options)
    from megatron_spdf.evaluation.coordinate_check import plot_sizes, scaling_exponents

    slopes = {rule: {what: scaling_exponents(sizes) for what, sizes in scaled.items()}
              for rule, scaled in found.items()}
    print(to_json({"sizes": found, "slopes": slopes}) if options.json else render(slopes))
    if options.output:
        plot_sizes(found, options.output)
        print(f"wrote {options.output}", file=sys.stderr)
    return 0


def check(options: argparse.Namespace) -> dict[str, dict[str, dict[float, dict[str, float]]]]:
    """parametrization -> "width" or "density" -> scale -> part of the model -> size at the last
    step."""
    from tqdm import tqdm

    from megatron_spdf.parallel import fake_cuda

    fake_cuda.install()  # before anything that imports megatron.core
    from megatron_spdf.evaluation.coordinate_check import activation_sizes

    with tempfile.TemporaryDirectory() as directory:
        found: dict = {}
        for rule, what, scale, recipe in tqdm(cells(options, directory), unit="model",
                                              disable=not sys.stderr.isatty()):
            sizes = activation_sizes(recipe, options.steps)
            found.setdefault(rule, {}).setdefault(what, {})[scale] = sizes[-1]
    return found


def cells(options: argparse.Namespace, directory: str) -> list[tuple[str, str, float, Recipe]]:
    """parametrization, "width" or "density", scale and recipe of every model, in the order in which
    they are trained.

    Args:
        directory: in which they have their output.

    Raises:
        ValueError: a recipe is not valid, or there is one scale, of which no slope can be told.
    """
    base = load_recipe(options.recipe, options.overrides)
    head = base.model.hidden // base.model.heads
    scaled = {"width": {width: (width, 0.0) for width in options.widths},
              "density": {1.0 - level: (base.mup_base.hidden, level)
                          for level in options.sparsities}}
    for option, scales in zip(("--widths", "--sparsities"), scaled.values(), strict=True):
        if len(scales) < 2:
            raise ValueError(f"{option} names one value, and a slope needs two; add another")
    for width in options.widths:
        if width % head:
            raise ValueError(f"width {width} is not divisible by the size of a head, {head}, which "
                             "the recipe's model.hidden / model.heads gives; choose another")
    return [
        (rule, what, scale, load_recipe(options.recipe, [
            *options.overrides, f"parametrization={rule}", f"model.hidden={width}",
            f"model.heads={width // head}", f"model.ffn_hidden={4 * width}", f"sparsity={level}",
            f"model.query_groups={width // head}", f"output={directory}/run"]))
        for rule in RULES for what, scales in scaled.items()
        for scale, (width, level) in scales.items()]


def render(slopes: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for each part of the model, a column for each parametrization and what is scaled."""
    columns = [Column("", str)]
    for rule, scaled in slopes.items():
        columns += [Column(f"{rule}, {what}", found.get, ".3f") for what, found in scaled.items()]
    parts = list(next(iter(next(iter(slopes.values())).values())))
    return f"slope of log2 mean |activation|\n{Table(columns, parts).text()}"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("recipe", help="a pre-training recipe, see configs/pretrain")
    add_overrides(parser)
    parser.add_argument("--widths", type=positive, nargs="+", default=[64, 128, 256, 512, 1024],
                        metavar="N")
    parser.add_argument("--sparsities", type=number(float, least=0.0, most=1.0), nargs="+",
                        default=[0.0, 0.5, 0.75, 0.875, 0.9375], metavar="S")
    parser.add_argument("--steps", type=positive, default=5, metavar="N", help="default: 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every size")
    parser.add_argument("-o", "--output", type=output_picture, metavar="PNG", help="draw the sizes")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
