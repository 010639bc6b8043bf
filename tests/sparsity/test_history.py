"""What is seen of moves, against a history of masks made by hand: entries moved, overlap with the
first mask, ages; by weight, and by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_spdf.kernels.mask import pack
from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.sparsity.algorithms.set import Set
from megatron_spdf.sparsity.algorithms.static import Static
from megatron_spdf.sparsity.history import OLDEST, Change, aged, by_layer
from megatron_spdf.sparsity.moving import Carrier
from megatron_spdf.sparsity.plan import SparseWeight

# Masks of a weight of 2 slices with 2 of 6 entries each, one after another.
HISTORY = [[[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]],
           [[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]],  # one moves
           [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],  # the last of the first mask die
           [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]]  # two of them come back
# moved, as at first, sum of ages after each move
SEEN = [(1, 3, 3), (3, 0, 1), (2, 2, 2)]
AGES = [[[1, 0], [1, 1]], [[1, 0], [0, 0]], [[0, 1], [1, 0]]]


def compact(algorithm=None) -> CompactWeight:
    weight = SparseWeight("w", (4, 3), 0, 2, 2 / 3, algorithm=algorithm or Set(track_ages=True))
    made = CompactWeight(weight, 0, 0, 1, "cpu")
    made.begin_with(pack(torch.tensor(HISTORY[0], dtype=torch.bool)))
    return made


def test_moves_are_counted_against_the_mask_before_and_the_first():
    weight = compact()
    for masks, (moved, as_first, age), ages in zip(HISTORY[1:], SEEN, AGES, strict=True):
        change = weight.move_mask(pack(torch.tensor(masks, dtype=torch.bool)))
        assert change == Change(moved, 4, as_first, age)
        assert weight.ages.tolist() == ages
    assert (change.share, change.overlap, change.mean_age) == (0.5, 0.5, 0.5)


def test_what_a_checkpoint_has_goes_on():
    """The first mask and the ages are in the state, at whatever mask it is read."""
    before, after = compact(), compact()
    for masks in HISTORY[1:3]:
        before.move_mask(pack(torch.tensor(masks, dtype=torch.bool)))
    after.load_state_dict(before.state_dict())
    last = pack(torch.tensor(HISTORY[3], dtype=torch.bool))
    assert after.move_mask(last) == before.move_mask(last) == Change(2, 4, 2, 2)


def test_nothing_is_kept_that_is_not_asked_for():
    assert set(compact(Static()).state_dict()) == {"mask_bits"}
    assert set(compact(Set()).state_dict()) == {"mask_bits", "first_bits"}
    change = compact(Set()).move_mask(pack(torch.tensor(HISTORY[1], dtype=torch.bool)))
    assert change == Change(1, 4, 3, 0)


def test_ages_stop_at_the_oldest():
    bits = np.packbits([[1, 1, 0, 0]], axis=1)
    bits = torch.from_numpy(bits)
    ages = torch.tensor([[OLDEST - 1, OLDEST]], dtype=torch.uint8)
    assert aged(ages, Carrier(bits, bits, 4, 2)).tolist() == [[OLDEST, OLDEST]]


def test_layers_are_those_of_their_weights_together():
    changes = {"b.1": Change(1, 10, 9, 4), "a.0": Change(2, 20, 8, 1), "a.1": Change(3, 30, 6, 2)}
    found = by_layer(changes, {"a.0": 0, "a.1": 1, "b.1": 1, "dense": 0})
    assert list(found.items()) == [(0, Change(2, 20, 8, 1)), (1, Change(4, 40, 15, 6))]
    assert found[1].overlap == pytest.approx(15 / 40)
