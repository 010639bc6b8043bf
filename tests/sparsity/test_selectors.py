"""Selectors keep what their papers say, in every slice as many as planned: against NumPy in
float64."""

from __future__ import annotations

import numpy as np
import one_shot_reference as reference
import pytest
import torch
from one_shot_reference import brain_surgery, dampened

from megatron_spdf.sparsity.patterns.n_m import NofM
from megatron_spdf.sparsity.patterns.tiles import Tiles
from megatron_spdf.sparsity.patterns.two_four import TwoFour
from megatron_spdf.sparsity.patterns.unstructured import Unstructured
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.selectors import sparsegpt, wanda
from megatron_spdf.sparsity.selectors.base import SELECTORS, TrainedWeight
from megatron_spdf.sparsity.slices import join_slices, slice_of

BLOCK = 8  # columns, in place of 128


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK", BLOCK)


def planned(axis: int, level: float = 0.5, shape: tuple[int, int] = (12, 40),
            slices: int = 2, pattern=None) -> SparseWeight:
    return SparseWeight("w", shape, axis, slices, level, pattern or Unstructured())


def weight_of(w: SparseWeight) -> torch.Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(1))


def inputs_of(w: SparseWeight, tokens: int = 300) -> torch.Tensor:
    """Correlated inputs of different sizes."""
    numbers, columns = torch.Generator().manual_seed(2), w.shape[1]
    mixed = torch.randn(tokens, columns, generator=numbers) @ torch.randn(
        columns, columns, generator=numbers)
    return mixed * torch.linspace(0.2, 3.0, columns)


def selected(name: str, w: SparseWeight, inputs: torch.Tensor | None = None,
             matrices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask of the whole weight, which has as many active entries as planned in every
    slice."""
    selector, kept = SELECTORS.get(name)(), None
    if selector.calibrated:
        kept = selector.inputs(w.shape[1], torch.device("cpu"))
        for part in (inputs_of(w) if inputs is None else inputs).split(77):
            kept.add(part)
    matrices = np.zeros(w.shape[0], int) if matrices is None else matrices
    values, masks = selector.select(TrainedWeight(weight_of(w), w, 0, matrices, kept))
    assert masks.shape == (w.slices, w.numel // w.slices) and masks.dtype == bool
    assert (masks.sum(1) == w.active_per_slice).all()
    assert w.fault(masks) is None
    return values.numpy(), join_slices(torch.from_numpy(masks), w).numpy()


CUTS = [(axis, level, shape, slices) for axis in (0, 1) for level in (0.5, 0.75, 0.9)
        for shape, slices in (((12, 40), 2), ((10, 38), 2), ((9, 33), 3))]


@pytest.mark.parametrize(("axis", "level", "shape", "slices"), CUTS)
@pytest.mark.parametrize("name", ["random", "magnitude", "wanda", "sparsegpt"])
def test_every_slice_keeps_as_many_as_planned(name, axis, level, shape, slices):
    if shape[axis] % slices == 0:
        selected(name, planned(axis, level, shape, slices))


@pytest.mark.parametrize("axis", [0, 1])
def test_wanda_compares_each_row_of_each_slice(axis):
    """With rows among which the active entries divide, the choice of the reference."""
    w = planned(axis)
    inputs = inputs_of(w)
    values, mask = selected("wanda", w, inputs)
    _, expected = reference.wanda(w, weight_of(w).double().numpy(), inputs.double().numpy())
    assert np.array_equal(mask, expected) and mask.mean() == 0.5
    assert np.array_equal(values, weight_of(w).numpy())


def test_with_equal_inputs_wanda_is_magnitude_by_rows():
    w = planned(0)
    mask = selected("wanda", w, torch.ones(64, 40))[1]
    for row, kept in zip(np.abs(weight_of(w).numpy()), mask, strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-row)[:20])


def test_rows_that_cannot_be_equal_differ_by_one_in_favor_of_the_highest():
    scores = np.array([[5, 1, 4, 0], [9, 8, 7, 1], [3, 3, 3, 3]], float)
    assert wanda.largest_by_row(scores, 8).tolist() == [
        [True, False, True, False], [True, True, True, False], [True, True, True, False]]
    assert wanda.largest_by_row(scores, 2).tolist() == [
        [True, False, False, False], [True, False, False, False], [False] * 4]
    assert wanda.largest_by_row(scores, 12).all()


def test_inputs_that_are_always_zero_keep_no_weight_where_others_can_stay():
    w = planned(0)
    inputs = inputs_of(w)
    inputs[:, 5] = 0.0
    for name in ("wanda", "sparsegpt"):
        assert not selected(name, w, inputs)[1][:, 5].any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("level", [0.5, 0.75])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(axis, level):
    w = planned(axis, level)
    inputs = inputs_of(w)
    values, mask = selected("sparsegpt", w, inputs)
    hessian = dampened(inputs.double().numpy())
    expected, kept = brain_surgery(w, weight_of(w).numpy(), hessian, BLOCK)
    assert np.array_equal(mask, kept)
    np.testing.assert_allclose(values * mask, expected, rtol=2e-4, atol=2e-4)
    assert not (values * ~mask).any()
    # what it is for: the layer's outputs
    x, dense = inputs.numpy(), weight_of(w).numpy()
    lost = [np.square(x @ (dense - other).T).sum() for other in
            (values, dense * mask, dense * selected("magnitude", w)[1])]
    assert lost[0] < lost[1] and lost[0] < lost[2]


def test_sparsegpt_compares_rows_of_one_matrix():
    """Of each slice's rows two lie in one matrix, one in another, three in a third: here by
    turns."""
    w, inputs = planned(0, 0.6), inputs_of(planned(0))
    matrices = np.tile([0, 1, 2, 0, 2, 2], 2)
    values, mask = selected("sparsegpt", w, inputs, matrices)
    expected, kept = brain_surgery(w, weight_of(w).numpy(), dampened(inputs.double().numpy()),
                                   BLOCK, matrices=matrices)
    assert np.array_equal(mask, kept)
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-4)
    for part in (mask[:6], mask[6:]):
        for number, rows in ((0, 2), (1, 1), (2, 3)):
            assert abs(part[matrices[:6] == number].sum() - 0.4 * 40 * rows) < 6


@pytest.mark.parametrize("axis", [0, 1])
def test_with_the_identity_sparsegpt_is_magnitude_in_blocks(axis):
    """And changes no value that stays."""
    w = planned(axis, 0.7)
    values, mask = selected("sparsegpt", w, torch.eye(40).repeat(3, 1))
    dense = weight_of(w).numpy()
    assert np.array_equal(values[mask], dense[mask])
    for part, kept in zip(parts(w, np.abs(dense)), parts(w, mask), strict=True):
        for start in range(0, part.shape[1], BLOCK):
            of_part, of_kept = (a[:, start : start + BLOCK] for a in (part, kept))
            order = np.argsort(-of_part, axis=None)
            assert set(np.flatnonzero(of_kept)) == set(order[: of_kept.sum()])
        assert abs(kept[:, :BLOCK].mean() - 0.3) < 0.01  # each block has its share


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_two_of_four_both_ways(name):
    w = planned(0, 0.5, (16, 24), 2, TwoFour())
    inputs = inputs_of(w)
    values, mask = selected(name, w, inputs)
    if name == "sparsegpt":
        hessian = dampened(inputs.double().numpy())
        expected, _ = brain_surgery(w, weight_of(w).numpy(), hessian, given=mask)
        np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-4)
        diagonal = [np.linalg.inv(hessian[c:, c:])[0, 0] for c in range(4)]
        costs = np.square(weight_of(w)[:8, :4].numpy()) / diagonal  # no column is done yet
        assert np.array_equal(mask[:8, :4], TwoFour().largest(costs, 0.5))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_n_of_every_m_inputs(name, axis):
    """N is what stays; SparseGPT chooses every m columns, by the values that it has come to."""
    w = planned(axis, 0.75, (8, 24), 2, NofM(n=1, m=4))
    inputs = inputs_of(w)
    values, mask = selected(name, w, inputs)
    assert (mask.reshape(8, 6, 4).sum(2) == 1).all()
    if name == "sparsegpt":
        hessian = dampened(inputs.double().numpy())
        expected, _ = brain_surgery(w, weight_of(w).numpy(), hessian, given=mask)
        np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-4)
        done, _ = brain_surgery(w, weight_of(w).numpy(), hessian,
                                given=mask | (np.arange(24) >= 8))  # all before column 8
        costs = [done[:, c] ** 2 / np.linalg.inv(hessian[c:, c:])[0, 0] for c in range(8, 12)]
        assert np.array_equal(mask[:, 8:12].argmax(1), np.argmax(costs, axis=0))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_tiles_stay_or_go_as_a_whole(name):
    w = planned(0, 0.5, (16, 24), 1, Tiles(tile=4))
    inputs = inputs_of(w)
    values, mask = selected(name, w, inputs)
    if name == "sparsegpt":
        expected, _ = brain_surgery(w, weight_of(w).numpy(), dampened(inputs.double().numpy()),
                                    given=mask)
        np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-4)


def test_a_hessian_without_inverse_is_refused(monkeypatch):
    w = planned(0)
    with pytest.raises(ValueError, match="Hessian of 40 inputs over 300 tokens has no inverse"):
        selected("sparsegpt", w, torch.full((300, 40), float("nan")))


def parts(w: SparseWeight, whole: np.ndarray) -> list[np.ndarray]:
    """The slices of an array of the weight's shape."""
    tensor = torch.from_numpy(np.ascontiguousarray(whole))
    return [slice_of(tensor, w, c).view(w.slice_shape).numpy() for c in range(w.slices)]
