"""The same engine on a GPU: against CPU in fp32, and bf16 to its precision."""

import pytest
import torch
from cases import train
from head_cases import against_float64

pytestmark = [pytest.mark.gpu, pytest.mark.slow,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

STEPS = 20
BLOCKS = {"sparsity": {"level": 0.5, "pattern": "tile", "tile": 16}}
TWO_FOUR = {"sparsity": {"level": 0.5, "pattern": "2:4"}, "model": {"ffn_hidden": 64}}


@pytest.fixture(scope="module")
def both(ranks, make_recipe):
    """What comes of a run on a GPU and on the CPU."""
    def train_on(precision: str, sections: dict) -> list[dict]:
        recipe = make_recipe(train={"precision": precision}, **sections)
        return [ranks(1, gpu=gpu).run(train, recipe, steps=STEPS) for gpu in (True, False)]
    return train_on


@pytest.mark.parametrize("sections", [{}, BLOCKS], ids=["unstructured", "blocks"])
def test_masks_are_the_same(both, sections):
    on_gpu, on_cpu = both("fp32", sections)
    assert on_gpu["masks"] == on_cpu["masks"]


# fp32 matrix products on a GPU sum in another order and may use TF32 inputs; bf16 has 8 bits of
# mantissa.
@pytest.mark.parametrize(("precision", "sections", "tolerance"), [
    ("fp32", {}, 2e-3), ("bf16", {}, 2e-2), ("fp32", BLOCKS, 2e-3), ("bf16", BLOCKS, 2e-2),
    ("bf16", TWO_FOUR, 2e-2)], ids=["fp32", "bf16", "blocks fp32", "blocks bf16", "2:4 bf16"])
def test_losses_agree(both, precision, sections, tolerance):
    on_gpu, on_cpu = ([loss for loss, _ in there["curve"]] for there in both(precision, sections))
    assert on_gpu == pytest.approx(on_cpu, abs=tolerance)


# Logits in bf16 are rounded before the softmax, and their gradients after it.
def test_the_loss_of_the_head_and_its_gradients_are_those_of_float64(ranks, make_recipe):
    for (dtype, *case), errors in ranks(1, gpu=True).run(against_float64, make_recipe()).items():
        assert max(errors) < (1e-5 if dtype == "torch.float32" else 1e-2), (dtype, case)
