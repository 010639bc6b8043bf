"""Invariant 4 on tiles: SET and RigL move tiles by swaps, which keep the number of active tiles in
every row and column of a slice; against the rule on dense weights, in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tile_rule import next_tiles, norms, random_births, sums

from megatron_spdf.kernels.mask import unpack
from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.layers.products.tiles import TileProduct
from megatron_spdf.sparsity.algorithms.base import Moment
from megatron_spdf.sparsity.algorithms.rigl import Rigl
from megatron_spdf.sparsity.algorithms.set import Set
from megatron_spdf.sparsity.moving import Carrier, born, moved_masks
from megatron_spdf.sparsity.patterns.tiles import Tiles, swap_tiles
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.slices import join_slices, slice_of

NAME = "decoder.layers.0.mlp.linear_fc1.weight"
SEED = 3
WHEN = Moment(update=2, step=30, steps=100)
SIZE = 4
# slices of 8 x 12 tiles, of which 24 are active
WEIGHTS = {"rows": SparseWeight(NAME, (64, 48), 0, 2, 0.75, Tiles(tile=SIZE)),
           "columns": SparseWeight(NAME, (32, 96), 1, 2, 0.75, Tiles(tile=SIZE))}


@pytest.fixture(params=WEIGHTS.values(), ids=WEIGHTS)
def weight(request) -> SparseWeight:
    return request.param


def packed(weight: SparseWeight) -> torch.Tensor:
    masks = [weight.draw(SEED, c) for c in range(weight.slices)]
    return torch.from_numpy(np.packbits(masks, axis=1))


def drawn(weight: SparseWeight, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (slices, k) and a gradient of the dense weight."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(weight.slices, weight.active_per_slice, generator=draw),
            torch.randn(*weight.shape, generator=draw))


def tiles_of(weight: SparseWeight, bits: torch.Tensor) -> np.ndarray:
    """(slices, R, C) bool; no tile is active in part."""
    rows, columns = weight.slice_shape
    masks = unpack(bits, rows * columns).numpy()
    tiles = masks.reshape(-1, rows // SIZE, SIZE, columns // SIZE, SIZE).sum((2, 4))
    assert set(tiles.flatten()) == {0, SIZE**2}
    return tiles > 0


@pytest.mark.parametrize("fraction", [0.3, 0.9])
@pytest.mark.parametrize("kind", [Set, Rigl])
def test_moves_are_those_of_the_rule_on_dense_weights(weight, kind, fraction):
    algorithm = kind(fraction=fraction, anneal="constant", stop=1.0)
    bits, (values, gradient) = packed(weight), drawn(weight)
    moved = moved_masks(algorithm, WHEN, weight, SEED, 0, bits, values, gradient)
    before, after, shape = tiles_of(weight, bits), tiles_of(weight, moved), weight.slice_shape
    count = round(fraction * before[0].sum())  # 7 or 22
    for c in range(weight.slices):
        magnitude = np.zeros(math.prod(shape))
        magnitude[unpack(bits, len(magnitude))[c].numpy()] = values[c].abs().numpy()
        births = (-norms(slice_of(gradient, weight, c).numpy(), shape, SIZE) if kind is Rigl
                  else random_births(before[c], SEED, NAME, c, WHEN.update))
        wanted = next_tiles(before[c], sums(magnitude, shape, SIZE), births, count)
        assert np.array_equal(after[c], wanted)
    assert born(bits, moved) == SIZE**2 * (before & ~after).sum()


@pytest.mark.parametrize("kind", [Set, Rigl])
def test_a_hundred_moves_keep_the_tiles_of_every_row_and_column(weight, kind):
    algorithm, bits = kind(fraction=0.4, anneal="constant", stop=1.0), packed(weight)
    first = tiles_of(weight, bits)
    for update in range(1, 101):
        values, gradient = drawn(weight, update)
        moved = moved_masks(algorithm, Moment(update, update, 100), weight, SEED, 0, bits, values,
                            gradient)
        before, after = tiles_of(weight, bits), tiles_of(weight, moved)
        assert (after.sum(1) == 2).all() and (after.sum(2) == 3).all()
        # 24 active tiles, of which 10 die, and none that has died comes back
        assert ((before & ~after).sum((1, 2)) == 10).all()
        assert ((after & ~before).sum((1, 2)) == 10).all()
        bits = moved
    assert (first & tiles_of(weight, bits)).mean() < 0.12  # by chance a sixteenth


def test_what_stays_keeps_its_values_and_what_is_born_is_zero(weight):
    bits, (values, gradient) = packed(weight), drawn(weight)
    moved = moved_masks(Rigl(), WHEN, weight, SEED, 0, bits, values, gradient)
    entries = math.prod(weight.slice_shape)
    whole = torch.zeros(weight.slices, entries)
    whole[unpack(bits, entries)] = values.flatten()
    there = Carrier(bits, moved, entries, values.shape[1])(values)
    after = torch.zeros(weight.slices, entries)
    after[unpack(moved, entries)] = there.flatten()
    assert torch.equal(after, whole * unpack(moved, entries)) and not torch.equal(bits, moved)


def test_masks_are_the_same_however_slices_are_shared_out(weight):
    bits, (values, gradient) = packed(weight), drawn(weight)
    for algorithm in (Set(), Rigl()):
        whole = moved_masks(algorithm, WHEN, weight, SEED, 0, bits, values, gradient)
        halves = [moved_masks(algorithm, WHEN, weight, SEED, c, bits[c : c + 1],
                              values[c : c + 1], gradient.chunk(2, weight.axis)[c])
                  for c in range(2)]
        assert torch.equal(whole, torch.cat(halves))


def test_the_smallest_dies_with_whom_the_largest_gradients_come(weight):
    """By hand: four tiles in a diagonal, whose smallest can swap with each of the others."""
    active = np.eye(4, dtype=bool)
    births = np.zeros((4, 4))
    births[0, 2] = births[2, 0] = -5.0
    births[0, 3] = -9.0
    died, born = swap_tiles(active, np.array([1.0, 2.0, 3.0, 4.0]), births[~active], 3)
    assert set(died) == {0, 10} and set(born) == {2, 8}  # (0, 0) and (2, 2) for (0, 2) and (2, 0)
    died, born = swap_tiles(active, np.array([1.0, 2.0, 3.0, 4.0]), births[~active], 4)
    assert set(died) == {0, 10, 5, 15} and set(born) == {2, 8, 7, 13}


def test_ties_die_by_position_and_an_odd_one_stays():
    active = np.eye(4, dtype=bool)
    died, born = swap_tiles(active, np.zeros(4), np.zeros(12), 3)
    assert set(died) == {0, 5} and set(born) == {1, 4}
    assert all(len(chosen) == 0 for chosen in swap_tiles(active, np.zeros(4), np.zeros(12), 1))


def test_where_no_two_can_swap_none_dies():
    """A row of active tiles beside an empty one: no other mask has as many in rows and columns."""
    active = np.array([[True, True], [False, False]])
    assert all(len(chosen) == 0
               for chosen in swap_tiles(active, np.zeros(2), np.zeros(2), 2))


def test_one_that_is_not_small_dies_where_no_small_one_can():
    """The two smallest lie in one row."""
    active = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=bool)
    died, born = swap_tiles(active, np.array([1.0, 2.0, 9.0, 8.0]), np.zeros(4), 2)
    assert set(died) == {0, 7} and set(born) == {3, 4}


@pytest.mark.parametrize("axis", WEIGHTS)
def test_tables_of_the_product_are_those_of_the_moved_mask(axis):
    weight = WEIGHTS[axis]
    compact = CompactWeight(weight, SEED, 0, 1, "cpu", TileProduct(None))
    before = compact.mask.tables
    values, gradient = drawn(weight)
    moved = moved_masks(Rigl(), WHEN, weight, SEED, 0, compact.mask_bits, values, gradient)
    compact.move_mask(moved)
    tables = compact.mask.tables
    assert not torch.equal(tables.columns, before.columns)
    rows = torch.arange(len(tables.columns)).repeat_interleave(tables.slots)
    grid = torch.zeros(weight.shape[0] // SIZE, weight.shape[1] // SIZE, dtype=torch.bool)
    grid[rows, tables.columns.flatten().long()] = True
    entries = join_slices(unpack(moved, math.prod(weight.slice_shape)), weight)
    assert torch.equal(grid, entries[::SIZE, ::SIZE])
    by_column = torch.zeros_like(grid)
    slots = tables.entries.long()
    column = torch.arange(len(slots)).repeat_interleave(slots.shape[1])
    by_column[slots.flatten() // tables.slots, column] = True
    assert torch.equal(by_column, grid)
    assert torch.equal(tables.columns.flatten()[slots.flatten()].long(), column)


@pytest.mark.parametrize("kind", [Set, Rigl])
def test_nothing_moves_with_fraction_zero(weight, kind):
    values, gradient = drawn(weight)
    moved = moved_masks(kind(fraction=0.0), WHEN, weight, SEED, 0, packed(weight), values, gradient)
    assert torch.equal(moved, packed(weight))
