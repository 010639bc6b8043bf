"""A run saved at one layout goes on at any other: the losses of the next steps are those of a
straight run.

LAYOUTS=all goes through all layouts dense and sparse, in fp32 and in bf16; without it sparse fp32
does, and dense bf16 through three.
"""

import math
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
from harness import Results, outcome, run_cases

pytestmark = pytest.mark.slow

SAVED, STEPS = 5, 10
# (tensor, pipeline, data) of the matrix; each is saved, and goes on from what the one before it
# saved.
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2), (4, 1, 1), (1, 4, 1)]
KINDS = {f"{sparsity} {precision}": {"sparsity": level,
                                     "train": {"precision": precision, "micro_batch": 4}}
         for sparsity, level in (("dense", 0.0), ("sparse", 0.75))
         for precision in ("fp32", "bf16")}
PLACES = {kind: LAYOUTS for kind in KINDS} if os.environ.get("LAYOUTS") == "all" else {
    "sparse fp32": LAYOUTS, "dense bf16": [(2, 1, 1), (1, 2, 1), (1, 1, 2)]}
PAIRS = [(kind, place) for kind, places in PLACES.items() for place in places]
ONE = (1, 1, 1)
SMALL = {"layers": 4, "hidden": 32, "heads": 4, "max_positions": 16}
# Parallel sums round otherwise. bf16: 8 bits of a loss near 5, and steps that differ from there on.
TOLERANCE = {"fp32": {"rel": 1e-5}, "bf16": {"abs": 2e-2}}


def layout(tensor: int, pipeline: int, data: int) -> dict:
    return {"tensor": tensor, "pipeline": pipeline, "data": data,
            "sequence": tensor > 1 and data > 1}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    """(part, kind, layout) -> losses: before the save, after it at the layout that follows in the
    list, and of the run that was not stopped."""
    root = tmp_path_factory.mktemp("reshard")

    def recipe(kind: str, place: tuple, name: str) -> dict:
        return make_recipe(str(root / name / kind / "-".join(map(str, place))), model=SMALL,
                           parallel=layout(*place),
                           **KINDS[kind])

    def cases(name: str, stop: int, world: int) -> Results:
        pairs = [(kind, ONE) for kind in PLACES] if name == "straight" else PAIRS
        there = {f"{kind} {place}": ("go_on", {"recipe": recipe(kind, place, name), "stop": stop})
                 for kind, place in pairs if math.prod(place) == world}
        return run_cases(world, there, root / f"{name} {world}")

    worlds = sorted({math.prod(place) for _, place in PAIRS} | {1})
    found = {(name, world): cases(name, stop, world) for world in worlds
             for name, stop in (("first", SAVED), ("second", STEPS), ("straight", STEPS))}

    @cache
    def losses(name: str, kind: str, place: tuple) -> list[float]:
        if name == "second":
            places = PLACES[kind]
            other = places[places.index(place) - 1]
            losses("first", kind, other)
            copies = (Path(recipe(kind, p, n)["output"], "checkpoints")
                      for p, n in ((other, "first"), (place, "second")))
            shutil.copytree(*copies)
        there = found[name, math.prod(place)]
        return [loss for loss, _ in outcome(there, f"{kind} {place}")]

    return losses


@pytest.mark.parametrize(("kind", "place"), PAIRS, ids=str)
def test_resumed_at_another_layout_equals_straight(results, kind, place):
    straight, tolerance = results("straight", kind, ONE), TOLERANCE[kind.split()[1]]
    assert results("first", kind, place) == pytest.approx(straight[:SAVED], **tolerance)
    assert results("second", kind, place) == pytest.approx(straight[SAVED:], **tolerance)


def test_three_heads_on_three_ranks(make_recipe, tmp_path_factory):
    """A degree that is no power of two: tensor 3, then pipeline 3, then data 3."""
    root = tmp_path_factory.mktemp("three")
    sections = {"model": {"layers": 3, "hidden": 48, "heads": 3},
                "train": {"global_batch": 6, "micro_batch": 2}}
    chain = [make_recipe(str(root / "chain"), parallel=p, **sections)
             for p in ({"tensor": 3}, {"pipeline": 3}, {"data": 3})]
    straight = make_recipe(str(root / "straight"), parallel={"tensor": 3}, **sections)
    results = run_cases(3, {"chain": ("cut", {"recipes": chain, "stops": [3, 6, 9]}),
                            "straight": ("cut", {"recipes": [straight], "stops": [9]})},
                        root / "cases")
    losses = {name: [loss for loss, _ in outcome(results, name)] for name in results}
    assert losses["chain"] == pytest.approx(losses["straight"], rel=1e-5)
