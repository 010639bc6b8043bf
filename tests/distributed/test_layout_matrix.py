"""A run saved at one layout goes on at any other: the losses of the next steps are those of a
straight run.

LAYOUTS=all goes through all layouts dense and sparse, in fp32 and in bf16; without it sparse fp32
does, and dense bf16 through three.
"""

import math
import os
import shutil
from pathlib import Path

import pytest
from harness import outcome, run_cases

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
SMALL = {"layers": 4, "hidden": 32, "heads": 4, "max_positions": 16}
# Parallel sums round otherwise. bf16: 8 bits of a loss near 5, and steps that differ from there on.
TOLERANCE = {"fp32": {"rel": 1e-5}, "bf16": {"abs": 2e-2}}


def layout(tensor: int, pipeline: int, data: int) -> dict:
    return {"tensor": tensor, "pipeline": pipeline, "data": data,
            "sequence": tensor > 1 and data > 1}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    """(kind, layout) -> losses before and after the save; the second part at the layout after the
    one that saved."""
    root = tmp_path_factory.mktemp("reshard")

    def recipe(kind: str, place: tuple, name: str) -> dict:
        return make_recipe(str(root / name / kind / "-".join(map(str, place))), model=SMALL,
                           parallel=layout(*place),
                           **KINDS[kind])

    def run_all(name: str, stop: int, pairs=PAIRS) -> dict:
        losses = {}
        for world in sorted({math.prod(place) for _, place in pairs}):
            cases = {f"{kind} {place}": ("go_on",
                                         {"recipe": recipe(kind, place, name), "stop": stop})
                     for kind, place in pairs if math.prod(place) == world}
            results = run_cases(world, cases, root / f"{name} {world}")
            losses |= {case: [loss for loss, _ in outcome(results, case)] for case in cases}
        return losses

    before = run_all("first", SAVED)
    for kind, places in PLACES.items():
        for place, other in zip(places, places[-1:] + places[:-1], strict=True):
            there, here = (Path(recipe(kind, p, n)["output"]) for p,
                           n in ((other, "first"), (place, "second")))
            shutil.copytree(there / "checkpoints", here / "checkpoints")
    return {"before": before, "after": run_all("second", STEPS),
            "straight": run_all("straight", STEPS, [(kind, (1, 1, 1)) for kind in PLACES])}


@pytest.mark.parametrize(("kind", "place"), PAIRS, ids=str)
def test_resumed_at_another_layout_equals_straight(results, kind, place):
    straight = results["straight"][f"{kind} (1, 1, 1)"]
    tolerance = TOLERANCE[kind.split()[1]]
    assert results["before"][f"{kind} {place}"] == pytest.approx(straight[:SAVED], **tolerance)
    assert results["after"][f"{kind} {place}"] == pytest.approx(straight[SAVED:], **tolerance)


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
