"""The same engine on a GPU: against CPU in fp32, and bf16 to its precision."""

import pytest
import torch
from harness import outcome, run_cases

pytestmark = [pytest.mark.gpu, pytest.mark.slow,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

STEPS = 20
BLOCKS = {"level": 0.5, "pattern": "tile", "tile": 16}
TWO_FOUR = {"sparsity": {"level": 0.5, "pattern": "2:4"}, "model": {"ffn_hidden": 64}}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    cases = {precision: ("train",
                         {"recipe": make_recipe(train={"precision": precision}), "steps": STEPS})
             for precision in ("fp32", "bf16")}
    cases |= {f"blocks {precision}": ("train",
                                      {"recipe": make_recipe(train={"precision": precision},
                                                             sparsity=BLOCKS),
                                                "steps": STEPS}) for precision in ("fp32", "bf16")}
    cases["2:4 bf16"] = ("train",
                         {"recipe": make_recipe(train={"precision": "bf16"}, **TWO_FOUR),
                          "steps": STEPS})
    directory = tmp_path_factory.mktemp("gpu")
    return {"gpu": run_cases(1, cases, directory / "gpu", gpu=True),
            "cpu": run_cases(1, cases, directory / "cpu")}


@pytest.mark.parametrize("name", ["fp32", "blocks fp32"])
def test_masks_are_the_same(results, name):
    assert outcome(results["gpu"], name)["masks"] == outcome(results["cpu"], name)["masks"]


# fp32 matrix products on a GPU sum in another order and may use TF32 inputs; bf16 has 8 bits of
# mantissa.
@pytest.mark.parametrize(("name", "tolerance"),
                         [("fp32", 2e-3), ("bf16", 2e-2), ("blocks fp32", 2e-3),
                                                 ("blocks bf16", 2e-2), ("2:4 bf16", 2e-2)])
def test_losses_agree(results, name, tolerance):
    curves = [[loss for loss, _ in outcome(results[where], name)["curve"]]
              for where in ("gpu", "cpu")]
    assert curves[0] == pytest.approx(curves[1], abs=tolerance)
