"""A run saved at one layout goes on at any other: the losses of the next steps are those of a straight run."""

import shutil
from pathlib import Path

import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

SAVED, STEPS = 10, 20
# (tensor, pipeline, data) of the matrix; each is saved, and goes on from what the one before it saved.
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2), (4, 1, 1), (1, 4, 1)]
BEFORE = dict(zip(LAYOUTS, LAYOUTS[-1:] + LAYOUTS[:-1], strict=True))
KINDS = {f"{sparsity} {precision}": {"sparsity": level, "train": {"precision": precision, "micro_batch": 4}}
         for sparsity, level in (("dense", 0.0), ("sparse", 0.75)) for precision in ("fp32", "bf16")}
SMALL = {"layers": 4, "hidden": 32, "heads": 4, "max_positions": 16}
# Parallel sums round otherwise. bf16: 8 bits of a loss near 5, and steps that differ from there on.
TOLERANCE = {"fp32": {"rel": 1e-5}, "bf16": {"abs": 2e-2}}


def layout(tensor: int, pipeline: int, data: int) -> dict:
    return {"tensor": tensor, "pipeline": pipeline, "data": data, "sequence": tensor > 1 and data > 1}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    """(kind, layout) -> losses before and after the save; the second part at the layout after the one that saved."""
    root = tmp_path_factory.mktemp("reshard")

    def recipe(kind: str, place: tuple, name: str) -> dict:
        return make_recipe(str(root / name / kind / "-".join(map(str, place))), model=SMALL, parallel=layout(*place),
                           **KINDS[kind])

    def run_all(name: str, stop: int, places=LAYOUTS) -> dict:
        losses = {}
        for world in sorted({t * p * d for t, p, d in places}):
            cases = {f"{kind} {place}": ("go_on", {"recipe": recipe(kind, place, name), "stop": stop})
                     for kind in KINDS for place in places if place[0] * place[1] * place[2] == world}
            results = run_cases(world, cases, root / f"{name} {world}")
            losses |= {case: [loss for loss, _ in outcome(results, case)] for case in cases}
        return losses

    before = run_all("first", SAVED)
    for kind in KINDS:
        for place, other in BEFORE.items():
            there, here = (Path(recipe(kind, p, n)["output"]) for p, n in ((other, "first"), (place, "second")))
            shutil.copytree(there / "checkpoints", here / "checkpoints")
    return {"before": before, "after": run_all("second", STEPS),
            "straight": run_all("straight", STEPS, [(1, 1, 1)])}


@pytest.mark.parametrize("place", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_another_layout_equals_straight(results, kind, place):
    straight = results["straight"][f"{kind} (1, 1, 1)"]
    tolerance = TOLERANCE[kind.split()[1]]
    assert results["before"][f"{kind} {place}"] == pytest.approx(straight[:SAVED], **tolerance)
    assert results["after"][f"{kind} {place}"] == pytest.approx(straight[SAVED:], **tolerance)


def test_three_heads_on_three_ranks(make_recipe, tmp_path_factory):
    """A degree that is no power of two: tensor 3, then pipeline 3, then data 3."""
    root = tmp_path_factory.mktemp("three")
    sections = {"model": {"layers": 3, "hidden": 48, "heads": 3, "vocab_size": 301}, "train": {"global_batch": 6}}
    chain = [make_recipe(str(root / "chain"), parallel=p, **sections)
             for p in ({"tensor": 3}, {"pipeline": 3}, {"data": 3})]
    straight = make_recipe(str(root / "straight"), parallel={"tensor": 3}, **sections)
    results = run_cases(3, {"chain": ("cut", {"recipes": chain, "stops": [3, 6, 9]}),
                            "straight": ("cut", {"recipes": [straight], "stops": [9]})}, root / "cases")
    losses = {name: [loss for loss, _ in outcome(results, name)] for name in results}
    assert losses["chain"] == pytest.approx(losses["straight"], rel=1e-5)
