"""A run saved at one layout goes on at any other: the losses of the next steps are those of a
straight run.

LAYOUTS=all goes through all layouts dense and sparse, in fp32 and in bf16; without it sparse fp32
does, and dense bf16 through three.
"""

import os
import shutil

import pytest
from cases import cut, go_on
from harness import world_of

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
def losses(ranks, make_recipe, tmp_path_factory):
    """Of a run of a kind in this directory, from its newest checkpoint on up to a step."""
    root = tmp_path_factory.mktemp("reshard")

    def run(directory: str, kind: str, place: tuple, stop: int) -> list[float]:
        recipe = make_recipe(str(root / kind / directory), model=SMALL, parallel=layout(*place),
                             **KINDS[kind])
        return [loss for loss, _ in ranks(world_of(recipe)).run(go_on, recipe, stop)]

    run.root = root
    return run


@pytest.mark.parametrize(("kind", "place"), PAIRS, ids=str)
def test_resumed_at_another_layout_equals_straight(losses, kind, place):
    straight, tolerance = losses("straight", kind, ONE, STEPS), TOLERANCE[kind.split()[1]]
    assert losses(f"of {place}", kind, place, SAVED) == pytest.approx(straight[:SAVED], **tolerance)
    places = PLACES[kind]
    other = places[places.index(place) - 1]
    losses(f"of {other}", kind, other, SAVED)
    shutil.copytree(losses.root / kind / f"of {other}" / "checkpoints",
                    losses.root / kind / f"on {place}" / "checkpoints")
    assert losses(f"on {place}", kind, place, STEPS) == pytest.approx(straight[SAVED:], **tolerance)


def test_three_heads_on_three_ranks(ranks, make_recipe):
    """A degree that is no power of two: tensor 3, then pipeline 3, then data 3."""
    chain = [make_recipe(parallel=layout, model={"layers": 3, "hidden": 48, "heads": 3},
                         train={"global_batch": 6, "micro_batch": 2})
             for layout in ({"tensor": 3}, {"pipeline": 3}, {"data": 3})]
    found, straight = ([loss for loss, _ in ranks(3).run(cut, recipes, stops)] for recipes, stops
                       in ((chain, [3, 6, 9]), (chain[:1], [9])))
    assert found == pytest.approx(straight, rel=1e-5)
