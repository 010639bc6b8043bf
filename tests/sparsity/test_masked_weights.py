"""Masked weights choose the largest magnitudes of every slice, and all entries learn, against plain
NumPy and PyTorch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from megatron_spdf.kernels.mask import unpack
from megatron_spdf.layers.compact import compact_of, densify, make_compact
from megatron_spdf.layers.masked import MaskedWeight, choose_masks
from megatron_spdf.sparsity.algorithms.ste import Ste
from megatron_spdf.sparsity.algorithms.top_kast import TopKast
from megatron_spdf.sparsity.history import Change
from megatron_spdf.sparsity.largest import keep_largest, keep_largest_balanced
from megatron_spdf.sparsity.patterns.n_m import NofM
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


def largest(dense: Tensor, axis: int, share: int = 1, slices: int = 4) -> Tensor:
    """The mask of a quarter of each slice, or `share` times that, by a stable sort."""
    masks = []
    for part in dense.chunk(slices, axis):
        mask, entries = np.zeros(part.numel(), bool), part.abs().numpy().ravel()
        mask[np.argsort(-entries, kind="stable")[: share * part.numel() // 4]] = True
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
    choose_masks([layer], due=False)  # it has not been used in between
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
    choose_masks([other])  # the last of every slice, counted against the mask of the checkpoint
    late = torch.arange(math.prod(SHAPE)).view(4, -1) % 120 >= 90
    assert torch.equal(other.weight != 0, late.view(SHAPE))
    assert int(compact_of(other).born) == int((late.view(SHAPE) & ~largest(dense, 0)).sum()) > 0


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


def test_n_of_m_keeps_the_largest_of_every_group():
    """2:4 by hand: of 4, -3, 1, 2 the first two, of equal ones the first."""
    pattern = NofM()
    values = np.array([[4, -3, 1, 2, 0, 0, 0, 0], [1, 1, 1, -5, -1, 2, -2, 1]], np.float32)
    expected = [[1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 0, 1, 1, 0]]
    assert pattern.largest(values, 0.5).astype(int).tolist() == expected


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_group_has_n_of_m(n, m, axis):
    """Drawn and chosen, in slices along either axis."""
    weight = SparseWeight("w", (16, 48), axis, 2, 1 - n / m, NofM(n=n, m=m), algorithm=Ste())
    assert weight.pattern.cut("w", (16, 48), axis, 2, 1 - n / m) == 2
    masks = np.stack([weight.draw(0, c) for c in range(2)])
    values = torch.randn(2, *weight.slice_shape, generator=torch.Generator().manual_seed(0))
    chosen = weight.pattern.chosen(values.abs(), weight.level).numpy()
    for each in (masks, chosen):
        assert weight.fault(each.reshape(2, -1)) is None
        assert (each.reshape(-1, m).sum(1) == n).all()
    assert weight.fault(~masks) is not None or 2 * n == m
    assert weight.active == masks.sum()


@pytest.mark.parametrize("level, shape, keys, told", [
    (0.75, (16, 48), {}, "level 0.5; take that"),
    (0.5, (16, 45), {}, "no multiple of m"),
])
def test_weights_that_cannot_be_n_of_m_are_refused(level, shape, keys, told):
    with pytest.raises(ValueError, match=told):
        NofM(**keys).cut("w", shape, 1, 1, level)


@pytest.mark.parametrize(("shape", "axis", "slices"), [
    ((8, 4), 0, 4), ((8, 16), 1, 4), ((8, 8), 1, 2), ((8, 12), 1, 1)])
def test_n_of_m_has_as_many_slices_as_cut_no_group(shape, axis, slices):
    """Of four at most; cuts by rows cut none."""
    assert NofM(n=2, m=4).cut("w", shape, axis, 4, 0.5) == slices


@pytest.mark.parametrize("grid, per_row", [((6, 6), 2), ((4, 12), 3), ((12, 4), 1), ((5, 5), 3),
                                           ((9, 6), 2)])
def test_tiles_are_balanced_and_hold_nearly_the_most(grid, per_row):
    """Against the best balanced masks, found by linear programming."""
    rows, columns = grid
    scores = torch.rand(3, *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = keep_largest_balanced(scores, per_row).numpy()
    assert (kept.sum(2) == per_row).all() and (kept.sum(1) == per_row * rows // columns).all()
    sums = np.concatenate([np.kron(np.eye(rows), np.ones(columns)),
                           np.kron(np.ones(rows), np.eye(columns))])
    wanted = [per_row] * rows + [per_row * rows // columns] * columns
    for mask, score in zip(kept, scores.numpy(), strict=True):
        best = -linprog(-score.ravel(), A_eq=sums, b_eq=wanted, bounds=(0, 1)).fun
        assert 0.95 * best <= score[mask].sum() <= best + 1e-9


def test_the_backward_set_holds_the_forward_set_and_others_get_no_gradient():
    """Top-KAST: A of a quarter, B of a half; 1 in A and 1 / D in the rest of B, times the penalty
    (Jayakumar et al. 2020, equation 4)."""
    planned = SparseWeight("w", SHAPE, 0, 4, 0.75, algorithm=TopKast(penalty=0.5))
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    dense = layer.weight.detach().clone()
    make_compact(layer, MaskedWeight(planned, SEED, 0, 1, "cpu", None, micro_batches=1))
    x = torch.randn(3, SHAPE[1])
    layer(x).sum().backward()
    forward, backward = largest(dense, 0), largest(dense, 0, share=2)
    assert (forward & ~backward).sum() == 0 and backward.sum() == 2 * forward.sum()
    pull = 0.5 * dense * (forward + (backward & ~forward) / 0.25)
    expected = x.sum(0).expand(SHAPE) * backward + pull
    torch.testing.assert_close(layer.parametrizations.weight.original.grad.view(SHAPE), expected)


def test_the_entries_that_a_choice_makes_active_are_counted():
    layer, dense = masked_layer(0)
    compact = compact_of(layer)
    before = layer.weight != 0
    assert compact.born is None  # the first choice moves nothing
    with torch.no_grad():
        layer.parametrizations.weight.original.neg_().reciprocal_()
    choose_masks([layer])
    assert int(((layer.weight != 0) & ~before).sum()) == int(compact.born) > 0


def test_what_becomes_of_the_first_choice_is_seen():
    """Overlap with it, and choices since each active entry became active; both go on from a
    checkpoint."""
    layer, dense = masked_layer(0, track_ages=True)
    compact, first = compact_of(layer), layer.weight.detach() != 0
    assert torch.equal(compact.first_bits, compact.mask_bits) and not compact.ages.any()
    values = layer.parametrizations.weight.original
    with torch.no_grad():
        values[:, ::2] *= -1e-3  # about half of those that were active leave
    choose_masks([layer])
    second = layer.weight != 0
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    for each in (layer, other):
        choose_masks([each])
        found = compact_of(each)
        assert torch.equal(each.weight != 0, second)
        both = int((first & second).sum())
        assert 0 < both < int(first.sum())
        assert found.seen(0) == Change(0, int(first.sum()), both, both + int(second.sum()))
