"""The same engine on a GPU: against CPU in fp32, and bf16 to its precision."""

import pytest
import torch
from harness import outcome, run_cases

pytestmark = [pytest.mark.gpu, pytest.mark.slow,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

STEPS = 20


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    cases = {precision: ("train", {"recipe": make_recipe(train={"precision": precision}), "steps": STEPS})
             for precision in ("fp32", "bf16")}
    directory = tmp_path_factory.mktemp("gpu")
    return {"gpu": run_cases(1, cases, directory / "gpu", gpu=True), "cpu": run_cases(1, cases, directory / "cpu")}


def test_masks_are_the_same(results):
    assert outcome(results["gpu"], "fp32")["masks"] == outcome(results["cpu"], "fp32")["masks"]


# fp32 matrix products on a GPU sum in another order and may use TF32 inputs; bf16 has 8 bits of mantissa.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 2e-2)])
def test_losses_agree(results, precision, tolerance):
    curves = [[loss for loss, _ in outcome(results[where], precision)["curve"]] for where in ("gpu", "cpu")]
    assert curves[0] == pytest.approx(curves[1], abs=tolerance)
