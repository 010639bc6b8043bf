"""tools/benchmark.py tiles: what it tries, not how fast it is."""

from __future__ import annotations

import pytest
import torch
from benchmarks import tiles
from small_masks import DEVICE, NO_TRITON

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.tiles import tile_products
from megatron_spdf.sparsity.plan import Plan

pytest.importorskip("triton", reason=NO_TRITON)
from megatron_spdf.kernels import triton_compact  # noqa: E402
from megatron_spdf.kernels.program_shapes import CANDIDATES, WARPS, ProgramShape  # noqa: E402

pytestmark = pytest.mark.slow  # in Triton's interpreter

KINDS = ["self_attention.linear_qkv.weight", "self_attention.linear_proj.weight",
         "mlp.linear_fc1.weight",
         "mlp.linear_fc2.weight"]
TRIED = {("forward", 16): [ProgramShape(16, 16, 4, 3), ProgramShape(32, 16, 4, 3)],
         ("input_gradient", 16): [ProgramShape(16, 16, 4, 3)],
         ("weight_gradient", 16): [ProgramShape(16, 16, 4, 3)]}
MOVES = [kernel for kernel, some in WARPS.items() for _ in some]


@pytest.fixture
def measured(recipe, monkeypatch):
    def measure(**sparsity) -> list[dict]:
        small = recipe(sparsity={"level": 0.5, **sparsity},
                       train={"sequence_length": 16, "precision": "fp32"})
        return tiles.measure(small, Plan.of(small), torch.device(DEVICE), 1e-4)

    def once(run, seconds: float) -> float:
        run()
        return seconds

    monkeypatch.setattr(tiles, "median_seconds", once)
    monkeypatch.setattr(dispatch, "backend_for",
                        lambda device: (triton_compact, triton_compact.NAME))
    tile_products.cache_clear()
    yield measure
    tile_products.cache_clear()


def test_every_program_shape_is_tried_on_every_weight(measured, monkeypatch):
    for key, some in TRIED.items():
        monkeypatch.setitem(CANDIDATES, key, some)
    rows = measured(pattern="tile", tile=16)
    assert [(row["weight"], row["kernel"]) for row in rows] == [
        (kind, kernel) for kind in KINDS
        for kernel in ("forward", "forward", "input_gradient", "weight_gradient", *MOVES)]
    assert all(row["seconds"] == 1e-4 for row in rows)  # each has run
    assert rows[1]["program"] == "32 wide, 16 deep, 4 warps, 3 stages"


def test_unstructured_weights_are_moved_with_every_number_of_warps(measured):
    rows = measured()
    assert [(row["kernel"], row["program"]) for row in rows[:6]] == [
        (kernel, f"{n} warps") for kernel in ("expand", "compress") for n in WARPS[kernel]]


def test_a_tile_that_does_not_fit_is_told_from_the_fastest(measured, monkeypatch):
    times = iter([3e-6, 2e-6, None] * 100)
    monkeypatch.setattr(tiles, "_seconds", lambda run, seconds: next(times))
    lines = [" ".join(line.split()) for line in "\n".join(tiles.render(measured())).splitlines()]
    assert lines[4] == "| expand | 1 warps | 12 | 1.000 |"
    assert lines[5] == "| expand | 2 warps | **8** | 1.500 |"
    assert lines[6] == "| expand | 4 warps | does not fit this GPU | - |"
