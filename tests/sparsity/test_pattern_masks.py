"""What masks of tiles and of 2:4 have in common: a stored stream, compact weights of them on all
ranks, refusals of other masks and of recipes that cannot have them."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import numpy as np
import pytest
import torch

from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.sparsity.patterns.n_m import NofM
from megatron_spdf.sparsity.patterns.tiles import Tiles, draw_tile_mask
from megatron_spdf.sparsity.patterns.two_four import TwoFour, draw_two_four
from megatron_spdf.sparsity.patterns.unstructured import Unstructured
from megatron_spdf.sparsity.plan import SparseWeight

NAME = "decoder.layers.0.mlp.linear_fc1.weight"
# A changed hash means that checkpoints made before the change can no longer be resumed.
GOLDEN = [
    (draw_tile_mask, (0, NAME, 0, (12, 32), 8),
     "fbe406a8777847b6ce8ae7977fa1a55cc7a055f5cd8bf71382a55a49101f0aa0"),
    (draw_tile_mask, (1, NAME, 0, (12, 32), 8),
     "26505d419c41a0aa24340b685a0f2a15543df37795c473da175ef11ac24d7444"),
    (draw_tile_mask, (0, NAME, 5, (7, 7), 3),
     "8d986182272f32117dffcc379d9cc70b7ad1639c9243d0676fbcdba9a90e4139"),
    (draw_two_four, (0, NAME, 0, (12, 32)),
     "b7951532d2c3d7c81f134ed4d263cd8a345fa131fcd005b164c81116b645ddc5"),
    (draw_two_four, (1, NAME, 0, (12, 32)),
     "e2afd76f15250eb9a409b83b6af56fe39f61a418f01500ee3fa043a955182c28"),
    (draw_two_four, (0, NAME, 5, (4, 4)),
     "9e0ebb886c344d8acab2b91eace8984f7aa4782c7359c4e1a14c9f9e32a7af14"),
]
TILES = {"level": 0.75, "pattern": "tile", "tile": 8}
HALF = {"level": 0.5, "pattern": "2:4"}
WEIGHTS = [SparseWeight("w.out", (48, 32), 0, 2, 0.75, Tiles(tile=4)),
           SparseWeight("w.in", (32, 64), 1, 4, 0.5, Tiles(tile=8)),
           SparseWeight("w.out", (48, 32), 0, 4, 0.5, TwoFour()),
           SparseWeight("w.in", (32, 64), 1, 4, 0.5, TwoFour())]


@pytest.mark.parametrize(("draw", "arguments", "stored"), GOLDEN)
def test_mask_is_the_stored_one(draw, arguments, stored):
    assert hashlib.sha256(np.packbits(draw(*arguments)).tobytes()).hexdigest() == stored


@pytest.mark.parametrize(("draw", "more"), [(draw_tile_mask, [4]), (draw_two_four, [])])
def test_masks_of_other_seeds_names_and_slices_differ(draw, more):
    drawn = {draw(seed, name, slice_id, (16, 16), *more).tobytes()
             for seed in (0, 1) for name in (NAME, "w1", "w") for slice_id in (0, 1, 10)}
    assert len(drawn) == 2 * 3 * 3


@pytest.mark.parametrize("pattern", [Unstructured(), Tiles(tile=8), TwoFour(),
                                     NofM(n=2, m=4)],
                         ids=lambda pattern: pattern.name)
def test_a_weight_draws_another_mask_for_every_slice_seed_and_name(pattern):
    weight = SparseWeight("w.in", (128, 512), 1, 4, 0.5, pattern)
    drawn = {named.draw(seed, part).tobytes()
             for named in (weight, dataclasses.replace(weight, name="another"))
             for seed in (0, 1) for part in range(weight.slices)}
    assert len(drawn) == 2 * 2 * weight.slices


@pytest.mark.parametrize(("weight", "world"), [
    (weight, world) for weight in WEIGHTS for world in (1, 2, 4) if weight.slices % world == 0],
    ids=lambda value: getattr(value, "name", value))
def test_masks_of_all_ranks_together_are_the_plans(weight, world):
    ranks = [CompactWeight(weight, 3, rank, world, "cpu") for rank in range(world)]
    found = torch.cat([c(torch.ones(c.values_shape)) != 0 for c in ranks], dim=weight.axis)
    slices = [weight.draw(3, c).reshape(weight.slice_shape) for c in range(weight.slices)]
    assert np.array_equal(found.numpy(), np.concatenate(slices, axis=weight.axis))
    assert float((found == 0).double().mean()) == weight.sparsity


def whole(first: np.ndarray, weight: SparseWeight) -> np.ndarray:
    """(slices, entries) of a mask of tiles (rows, columns), the same in every slice."""
    b = weight.slice_shape[0] // first.shape[0]
    return np.stack([first.repeat(b, 0).repeat(b, 1).reshape(-1)] * weight.slices)


def first_rows_of_tiles(weight: SparseWeight) -> np.ndarray:
    mask = np.zeros(weight.pattern.grid(weight.slice_shape), bool)
    mask.reshape(-1)[: weight.active_per_slice // weight.pattern.tile**2] = True
    return whole(mask, weight)


def first_columns_of_tiles(weight: SparseWeight) -> np.ndarray:
    """As many in every row."""
    mask = np.zeros(weight.pattern.grid(weight.slice_shape), bool)
    mask[:, : weight.pattern.per_row(weight.slice_shape, weight.level)] = True
    return whole(mask, weight)


def two_of_four_in_rows(weight: SparseWeight) -> np.ndarray:
    rows, columns = weight.slice_shape
    return whole(np.tile([True, True, False, False], (rows, columns // 4)), weight)


def two_of_four_in_columns(weight: SparseWeight) -> np.ndarray:
    rows, columns = weight.slice_shape
    return whole(np.tile([True, True, False, False], (columns, rows // 4)).T, weight)


def a_shift(weight: SparseWeight) -> np.ndarray:
    return np.roll(np.stack([weight.draw(3, c) for c in range(weight.slices)]), 1, axis=1)


@pytest.mark.parametrize(("weight", "said", "wrong"), [
    (weight, said, wrong) for weight, said, masks in (
        (WEIGHTS[0], "not of tiles of 4, equally many in every row and column",
         (a_shift, first_rows_of_tiles, first_columns_of_tiles)),
        (WEIGHTS[2], "masks of w.out are not 2:4 along rows and columns; use another",
         (a_shift, two_of_four_in_rows, two_of_four_in_columns))) for wrong in masks],
    ids=lambda value: getattr(value, "__name__", ""))
def test_mask_of_another_pattern_is_refused(weight, said, wrong):
    compact = CompactWeight(weight, 3, 0, 1, "cpu")
    assert weight.fault(np.stack([weight.draw(3, c) for c in range(weight.slices)])) is None
    masks = wrong(weight)
    assert (masks.sum(1) == weight.active_per_slice).all()
    compact.mask_bits.copy_(torch.from_numpy(np.packbits(masks, axis=1)))
    with pytest.raises(ValueError, match=said):
        compact.index_mask()


@pytest.mark.parametrize(("sections", "said"), [
    ({"sparsity": TILES, "parallel": {"tensor": 2}}, None),
    ({"sparsity": TILES | {"pattern": "unstructured"}, "parallel": {"tensor": 4}}, None),
    ({"sparsity": TILES, "parallel": {"tensor": 4}},
     "parallel.tensor=4 does not divide the 2 slices"),
    ({"sparsity": TILES | {"tile": 24}}, "tiles must divide both axes"),
    ({"sparsity": HALF}, None),
    ({"sparsity": HALF | {"level": 0.0}}, None),
    ({"sparsity": HALF | {"rules": [{"weights": "decoder.layers.0.*", "level": 0.0}]}}, None),
    ({"sparsity": HALF | {"level": 0.75}},
     r"pattern=2:4 on .*: level=0.75, and two of every four .* are level 0.5; take"),
    ({"sparsity": HALF | {"rules": [{"weights": "*.mlp.*", "level": 0.25}]}},
     "linear_fc1.weight .*: level=0.25"),
    ({"sparsity": HALF, "model": {"ffn_hidden": 72}},
     r"its 4 slices, .* are 18 x 64, and tiles of 4 x 4 must fill them; take a .* of 16,"),
    ({"sparsity": HALF, "model": {"hidden": 24, "heads": 4}},
     r"its 4 slices, .* are 18 x 24, and tiles")], ids=str)
def test_recipe_is_held_to_what_a_pattern_allows(recipe, sections, said):
    found = list(rule_violations(recipe(**sections)))
    if said is None:
        assert found == []
    else:
        (only,) = found
        assert re.search(said, only), only
