"""A test to copy for a mask algorithm of one's own: neither layouts nor stops change what it does.

Change the two names; the module lies in this directory, or in one on PYTHONPATH.
"""

from __future__ import annotations

import pytest
from harness import world_of
from mask_cases import trained

PLUGINS = "wander"  # module that registers the algorithm
SPARSITY = {"level": 0.75, "algorithm": "wander", "update": {"every": 3, "stop": 1.0}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(ranks, make_deep_recipe):
    """Losses and masks of 12 steps, or of those until a stop, with these sections."""
    def on_all(output: str | None = None, stop: int | None = None, **sections) -> tuple:
        recipe = make_deep_recipe(output, sparsity=SPARSITY, train={"tokens": 12 * 8 * 32},
                                  checkpoint={"asynchronous": False}, log={"every": 1}, **sections)
        found = ranks(world_of(recipe)).run_all(trained, recipe, stop)
        return found[0]["losses"], {name: m for rank in found for name, m in rank["masks"].items()}
    return on_all


@pytest.mark.parametrize("sections", [
    {"parallel": {"tensor": 2}}, {"parallel": {"pipeline": 2}}, {"parallel": {"data": 2}},
    {"parallel": {"data": 2, "zero_stage": 3}, "engine": "deepspeed"}],
    ids=["tensor", "pipeline", "data", "deepspeed zero 3"])
def test_layouts_and_engines_change_neither_masks_nor_losses(run, sections):
    losses, masks = run(**sections)
    assert losses == pytest.approx(run()[0], abs=1e-5) and masks == run()[1]


def test_a_run_that_was_stopped_goes_on_at_another_layout(run, tmp_path):
    before, _ = run(str(tmp_path / "run"), stop=5)
    after, masks = run(str(tmp_path / "run"), parallel={"tensor": 2})
    assert before + after == pytest.approx(run()[0], abs=1e-5) and masks == run()[1]
