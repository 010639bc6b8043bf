"""Triton's selections against a stable sort in float64, or of whole numbers."""

from __future__ import annotations

import pytest
import torch
from awkward_rows import awkward, first_of
from small_masks import DEVICE, NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)
from megatron_spdf.kernels import selection, triton_selection  # noqa: E402
from megatron_spdf.kernels.mask import pack, unpack  # noqa: E402
from megatron_spdf.kernels.program_shapes import SELECTION, SelectionShape  # noqa: E402

pytestmark = pytest.mark.slow  # in Triton's interpreter
ENTRIES = 330  # five blocks of 64, of which two are added up together, and a part of one


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """With the digits that are used."""
    shapes = {size: (SelectionShape(64, 1, shapes[0].digit),) for size, shapes in SELECTION.items()}
    monkeypatch.setattr(triton_selection, "SELECTION", shapes)
    monkeypatch.setattr(triton_selection, "AT_ONCE", triton_selection.tl.constexpr(2))


def test_trial_accepts_the_kernels_and_nothing_that_selects_otherwise(monkeypatch):
    selection._self_test(triton_selection, torch.device(DEVICE))
    right = triton_selection.lowest_bits
    monkeypatch.setattr(triton_selection, "lowest_bits", lambda scores, n: right(scores, n - 1))
    with pytest.raises(RuntimeError, match="something else than PyTorch"):
        selection._self_test(triton_selection, torch.device(DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", [(1, ENTRIES), (82, 164), (200,)], ids=str)
def test_the_largest_magnitudes_are_those_of_a_stable_sort(dtype, counts):
    values = awkward(ENTRIES, dtype).to(DEVICE)
    order = values.double().abs().argsort(dim=1, descending=True, stable=True)
    before = pack(torch.rand(values.shape, device=DEVICE) < 0.3)
    bits = [before.clone() for _ in counts]
    born = triton_selection.fill_largest(values, list(zip(counts, bits, strict=True)))
    for count, found in zip(counts, bits, strict=True):
        assert torch.equal(found, pack(first_of(order, count))), count
    assert int(born) == int(unpack(bits[0] & ~before, ENTRIES).sum())


@pytest.mark.parametrize(("kind", "count"), [
    ("floats", 0), ("floats", 1), ("floats", 100), ("floats", ENTRIES), ("negative floats", 100),
    ("words", 100), ("few words", 100)])
def test_the_lowest_scores_are_those_of_a_stable_sort(kind, count):
    draw, floats = torch.Generator().manual_seed(1), awkward(ENTRIES, torch.float32)
    scores = {"floats": floats, "negative floats": -floats.abs(),
              "words": torch.randint(-(2**63), 2**63 - 1, (2, ENTRIES), generator=draw),
              "few words": torch.randint(-9, 9, (2, ENTRIES), generator=draw)}[kind].to(DEVICE)
    order = (scores + 0).argsort(dim=1, stable=True)  # of floats, 0.0 and -0.0 are one
    assert torch.equal(triton_selection.lowest_bits(scores, count),
                       pack(first_of(order, count)))
