"""Masked weights choose the largest magnitudes of every slice, and all entries learn, against plain
NumPy and PyTorch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_spdf.kernels.mask import unpack
from megatron_spdf.layers.compact import compact_of, densify, make_compact
from megatron_spdf.layers.masked import MaskedWeight, choose_masks
from megatron_spdf.sparsity.algorithms.ste import Ste
from megatron_spdf.sparsity.largest import keep_largest
from megatron_spdf.sparsity.plan import SparseWeight

SEED, SHAPE = 5, (24, 20)
AXES = pytest.mark.parametrize("axis", [0, 1])


def masked_layer(axis: int, world: int = 1, rank: int = 0, **keys) -> tuple[nn.Linear, Tensor]:
    """A layer whose weight is masked, and its dense weight; of one tensor-parallel rank."""
    planned = SparseWeight("w", SHAPE, axis, 4, 0.75, algorithm=Ste(**keys))
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    dense = whole.chunk(world, axis)[rank].clone()
    layer = nn.Linear(dense.shape[1], dense.shape[0], bias=False)
    layer.weight.data.copy_(dense)
    make_compact(layer, MaskedWeight(planned, SEED, rank, world, "cpu", None, micro_batches=2))
    return layer, dense


def largest(dense: Tensor, axis: int, slices: int = 4) -> Tensor:
    """The mask of a quarter of each slice, by a stable sort."""
    masks = []
    for part in dense.chunk(slices, axis):
        mask, entries = np.zeros(part.numel(), bool), part.abs().numpy().ravel()
        mask[np.argsort(-entries, kind="stable")[: part.numel() // 4]] = True
        masks.append(torch.from_numpy(mask).view(part.shape))
    return torch.cat(masks, axis)


@AXES
def test_a_layer_computes_with_the_largest_of_each_slice_and_all_entries_learn(axis):
    layer, dense = masked_layer(axis)
    mask = largest(dense, axis)
    assert torch.equal(layer.weight, dense * mask)
    x = torch.randn(7, dense.shape[1])
    layer(x).square().sum().backward()
    plain = (dense * mask).requires_grad_()
    (x @ plain.T).square().sum().backward()
    compact = compact_of(layer)
    found = compact.compress(plain.grad, compact.mask)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, found)
    assert (plain.grad[~mask] != 0).all()


@AXES
def test_masks_follow_the_weights_when_they_are_due_and_not_before(axis):
    layer, dense = masked_layer(axis)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.neg_().reciprocal_()  # the smallest are the largest
    assert torch.equal(layer.weight != 0, before != 0)
    choose_masks([layer])
    assert torch.equal(layer.weight, dense.neg().reciprocal() * largest(1 / dense, axis))


@AXES
def test_ranks_choose_as_one_process_does(axis):
    whole, _ = masked_layer(axis)
    parts = [masked_layer(axis, 2, rank)[0].weight for rank in range(2)]
    assert torch.equal(whole.weight, torch.cat(parts, axis))


def test_decay_pulls_masked_entries_once_a_step():
    """lambda (1 - mask) w is added to the gradient (Zhou et al. 2021, equation 9), over the two
    micro-batches of a step."""
    layer, dense = masked_layer(0, decay_masked=0.5)
    values = layer.parametrizations.weight.original
    for _ in range(2):
        (layer(torch.zeros(3, dense.shape[1])).sum()).backward()
    expected = 0.5 * dense * ~largest(dense, 0)
    torch.testing.assert_close(values.grad.view(SHAPE), expected)
    values.grad = None
    values.main_grad = torch.zeros_like(values)  # an engine's buffer takes it instead
    layer(torch.zeros(3, dense.shape[1])).sum().backward()
    torch.testing.assert_close(values.main_grad.view(SHAPE), expected / 2)
    assert not values.grad.any()


def test_densifying_changes_no_output():
    layer, _ = masked_layer(1)
    x = torch.randn(5, SHAPE[1])
    before = layer(x)
    assert torch.equal(densify(layer)(x), before) and isinstance(layer.weight, nn.Parameter)


def test_a_saved_mask_holds_until_the_next_choice():
    layer, dense = masked_layer(0)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    other = copy.deepcopy(layer)
    _ = layer.weight
    mask = layer.state_dict()["parametrizations.weight.0.mask_bits"].clone()
    state["parametrizations.weight.0.mask_bits"] = mask
    state["parametrizations.weight.original"].copy_(
        torch.arange(1, 1 + math.prod(SHAPE)).view(4, -1))
    other.load_state_dict(state)
    assert torch.equal(other.weight != 0, largest(dense, 0))


@pytest.mark.parametrize("count", [1, 7, 30, 49, 50])
def test_ties_go_by_position(count):
    magnitudes = torch.randint(0, 4, (6, 50), generator=torch.Generator().manual_seed(2)).float()
    kept = keep_largest(magnitudes, count)
    for row, mask in zip(magnitudes.numpy(), kept.numpy(), strict=True):
        expected = np.argsort(-row, kind="stable")[:count]
        assert set(np.flatnonzero(mask)) == set(expected.tolist())


def test_bits_have_the_planned_number_of_entries():
    layer, _ = masked_layer(0)
    layer.weight.data.zero_()
    bits = compact_of(layer).mask_bits
    assert unpack(bits, math.prod(SHAPE) // 4).sum(1).tolist() == [30] * 4
