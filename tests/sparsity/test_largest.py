"""The largest and the lowest of each row, against a stable sort in float64, and without waiting
where kernels select."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from awkward_rows import awkward, first_of
from no_waits import NoWaits, as_kernel

from megatron_spdf.kernels.mask import ones, pack, unpack
from megatron_spdf.layers.masked import MaskedWeight
from megatron_spdf.sparsity import largest
from megatron_spdf.sparsity.algorithms.ste import Ste
from megatron_spdf.sparsity.algorithms.top_kast import TopKast
from megatron_spdf.sparsity.largest import fill_largest, keep_lowest, smallest_at_rank
from megatron_spdf.sparsity.plan import SparseWeight

ENTRIES = 203  # no multiple of 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 50, ENTRIES])
def test_the_largest_are_those_of_a_stable_sort(dtype, count):
    values = awkward(ENTRIES, dtype)
    order = values.double().abs().argsort(dim=1, descending=True, stable=True)
    before = pack(torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    bits, more = before.clone(), before.clone()
    born = fill_largest(values, [(count, bits), (100, more)])
    assert torch.equal(unpack(bits, ENTRIES), first_of(order, count))
    assert torch.equal(unpack(more, ENTRIES), first_of(order, 100))
    assert int(born) == int((first_of(order, count) & ~unpack(before, ENTRIES)).sum())


@pytest.mark.parametrize("count", [0, 1, 50, ENTRIES])
def test_the_lowest_are_those_of_a_stable_sort(count):
    words = torch.randint(-(2**63), 2**63 - 1, (2, ENTRIES),
                          generator=torch.Generator().manual_seed(2))
    for scores in (awkward(ENTRIES, torch.float32), words, words % 7):
        order = (scores + 0).argsort(dim=1, stable=True)  # of floats, 0.0 and -0.0 are one
        assert torch.equal(keep_lowest(scores, count), first_of(order, count))


@pytest.mark.parametrize("largest_wanted", [False, True])
def test_a_gpu_without_kernels_selects_as_a_cpu_does(largest_wanted):
    scores = awkward(ENTRIES, torch.float32)
    for count in (1, 50, ENTRIES):
        found = smallest_at_rank(scores, count, False, largest_wanted)
        order = scores.sort(dim=1, descending=largest_wanted).values
        assert torch.equal(found, order[:, count - 1])


def test_set_bits_are_counted():
    every = torch.arange(256, dtype=torch.uint8)
    assert ones(every).tolist() == [byte.bit_count() for byte in range(256)]


@pytest.mark.parametrize("algorithm", [Ste(), TopKast(), TopKast(track_ages=True)], ids=str)
def test_a_choice_is_one_selection_and_does_not_wait(algorithm, monkeypatch):
    """All it does beside it: with ages, carrying these, which waits."""
    planned = SparseWeight("w", (24, 20), 0, 4, 0.75, algorithm=algorithm)
    compact = MaskedWeight(planned, 0, 0, 1, "cpu", None, 1)
    values = torch.randn(4, 120, generator=torch.Generator().manual_seed(0)).bfloat16()
    compact.choose(values)
    calls = []

    @as_kernel
    def select(x, wanted):
        calls.append([count for count, _ in wanted])
        monkeypatch.undo()
        return fill_largest(x, wanted)

    compact.due, values, before = True, values.flip(1), compact.mask_bits.clone()
    monkeypatch.setattr(largest, "largest_kernels", lambda x: SimpleNamespace(fill_largest=select))
    if algorithm.tracks_ages:
        compact.choose(values)
    else:
        with NoWaits() as mode:
            compact.choose(values)
        assert sum(mode.calls.values()) <= 3, mode.calls  # views alone
    assert calls == [[30, 60] if planned.trains_some else [30]]
    order = values.double().abs().argsort(dim=1, descending=True, stable=True)
    assert torch.equal(unpack(compact.mask_bits, 120), first_of(order, 30))
    assert int(compact.born) == int((first_of(order, 30) & ~unpack(before, 120)).sum()) > 0
