"""The way of a GPU while tiles move, in Triton's interpreter: kernels that multiply with the active
tiles alone follow every move, whose dense gradient they do not form themselves."""

from __future__ import annotations

import pytest
from harness import world_of
from kernel_cases import with_triton
from mask_cases import plain, trained

pytest.importorskip("triton", reason="PyTorch for CUDA brings it")
pytestmark = pytest.mark.slow

# As small as kernels for tensor cores take tiles; at half density, so that two slices are balanced.
SMALL = {"model": {"layers": 1, "ffn_hidden": 64}, "evaluate": {"batches": 1},
         "train": {"global_batch": 2, "micro_batch": 1, "sequence_length": 16,
                   "tokens": 2 * 16 * 3},
         "optimizer": {"lr": 1e-3, "warmup_tokens": 16},
         "checkpoint": {"asynchronous": False}, "log": {"every": 1}}


@pytest.mark.parametrize(("name", "sections"), [
    ("rigl", {}), ("rigl", {"parallel": {"tensor": 2, "sequence": True}}),
    ("set", {"engine": "deepspeed"})], ids=["one", "tp2 sp", "deepspeed"])
def test_kernels_multiply_with_the_tiles_that_moved(ranks, make_recipe, name, sections):
    """One move only: where it leaves a head no keys, what their gradients are is rounding."""
    sparsity = {"level": 0.5, "pattern": "tile", "tile": 16, "algorithm": name,
                "update": {"every": 1, "fraction": 0.5, "stop": 0.5, "anneal": "constant"}}
    reference = ranks(1).run(plain, make_recipe(**SMALL, sparsity=sparsity))
    recipe = make_recipe(**SMALL | sections, sparsity=sparsity)
    there = ranks(world_of(recipe)).run_all(with_triton, trained, recipe)
    assert there[0]["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    together = {key: mask for rank in there for key, mask in rank["active"].items()}
    assert all((mask == together[key]).all() for key, mask in reference["active"].items())
    assert [move["step"] for move in there[0]["moves"]] == [1]
    assert there[0]["products"] == {"TileProduct"}
