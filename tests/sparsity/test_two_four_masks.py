"""2:4: transposable masks of a stored stream, compact weights of them, the recipe's rules."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.recipe.load import load_recipe, save_recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.sparsity.patterns.two_four import TwoFour, draw_two_four
from megatron_spdf.sparsity.plan import Plan, SparseWeight, render_plan

NAME = "decoder.layers.0.mlp.linear_fc1.weight"
HALF = {"level": 0.5, "pattern": "2:4"}
# A changed hash means that checkpoints made before the change can no longer be resumed.
GOLDEN = {
    (0, NAME, 0, (12, 32)): "b7951532d2c3d7c81f134ed4d263cd8a345fa131fcd005b164c81116b645ddc5",
    (1, NAME, 0, (12, 32)): "e2afd76f15250eb9a409b83b6af56fe39f61a418f01500ee3fa043a955182c28",
    (0, NAME, 5, (4, 4)): "9e0ebb886c344d8acab2b91eace8984f7aa4782c7359c4e1a14c9f9e32a7af14",
}


def tiles(mask: np.ndarray) -> np.ndarray:
    """(tiles, 4, 4)."""
    rows, columns = mask.shape
    return mask.reshape(rows // 4, 4, columns // 4, 4).swapaxes(1, 2).reshape(-1, 4, 4)


@pytest.mark.parametrize("arguments", GOLDEN, ids=str)
def test_mask_is_the_stored_one(arguments):
    bits = np.packbits(draw_two_four(*arguments))
    assert hashlib.sha256(bits.tobytes()).hexdigest() == GOLDEN[arguments]


@pytest.mark.parametrize("shape", [(4, 4), (4, 20), (12, 32), (64, 4)])
def test_two_of_every_four_along_rows_and_columns(shape):
    for seed in range(5):
        mask = draw_two_four(seed, NAME, 0, shape)
        assert mask.shape == shape and mask.dtype == bool
        assert (mask.reshape(shape[0], -1, 4).sum(-1) == 2).all()
        assert (mask.T.reshape(shape[1], -1, 4).sum(-1) == 2).all()


def test_each_of_the_90_tiles_comes_about_as_often():
    possible = {rows for rows in itertools.product(itertools.product((0, 1), repeat=4), repeat=4)
                if all(sum(row) == 2 for row in (*rows, *zip(*rows, strict=True)))}
    assert len(possible) == 90
    drawn = tiles(draw_two_four(0, NAME, 0, (600, 600)))
    counts = Counter(tuple(map(tuple, tile)) for tile in drawn.astype(int).tolist())
    assert set(counts) == possible
    expected = len(drawn) / 90
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert abs(chi_square - 89) < 5 * math.sqrt(2 * 89)


def test_neighbouring_tiles_are_independent():
    drawn = draw_two_four(0, NAME, 0, (800, 800))
    for left, right in ((drawn[:, :-4], drawn[:, 4:]), (drawn[:-4], drawn[4:])):
        together, expected = np.count_nonzero(left & right), left.size / 4
        assert abs(together - expected) < 5 * math.sqrt(expected)


def test_masks_of_other_seeds_names_and_slices_differ():
    drawn = {draw_two_four(seed, name, slice_id, (16, 16)).tobytes()
             for seed in (0, 1) for name in (NAME, "w1", "w") for slice_id in (0, 1, 10)}
    assert len(drawn) == 2 * 3 * 3


WEIGHTS = [SparseWeight("w.out", (48, 32), 0, 4, 0.5, TwoFour()),
           SparseWeight("w.in", (32, 64), 1, 4, 0.5, TwoFour())]
CASES = [(weight, world) for weight in WEIGHTS for world in (1, 2, 4)]
each_layout = pytest.mark.parametrize(("weight", "world"), CASES,
                                      ids=lambda v: getattr(v, "name", v))


@each_layout
def test_masks_of_all_ranks_together_are_the_plans(weight, world):
    ranks = [CompactWeight(weight, 3, rank, world, "cpu") for rank in range(world)]
    found = torch.cat([c(torch.ones(c.values_shape)) != 0 for c in ranks], dim=weight.axis)
    wanted = [torch.from_numpy(weight.draw(3, c)).view(weight.slice_shape)
              for c in range(weight.slices)]
    assert torch.equal(found, torch.cat(wanted, dim=weight.axis))
    assert (tiles(found.numpy()).sum(1) == 2).all() and (tiles(found.numpy()).sum(2) == 2).all()


def test_largest_mask_keeps_the_most_of_every_tile():
    """Against all 90 tiles, one by one."""
    possible = [np.array(rows) for rows in itertools.product(
        [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2], repeat=4)
        if all(sum(column) == 2 for column in zip(*rows, strict=True))]
    weight = WEIGHTS[0]
    values = np.random.default_rng(0).normal(size=weight.slice_shape).astype(np.float32)
    mask = weight.largest(values.reshape(-1))
    assert weight.fault(mask[None]) is None
    kept = tiles(np.abs(values) * mask.reshape(values.shape)).sum((1, 2))
    best = [max((tile * each).sum() for each in possible) for tile in tiles(np.abs(values))]
    assert kept == pytest.approx(np.array(best), rel=1e-6)


def test_mask_that_is_2_4_one_way_only_is_refused():
    weight = WEIGHTS[0]
    compact = CompactWeight(weight, 3, 0, 1, "cpu")
    masks = np.stack([weight.draw(3, c) for c in range(4)])
    assert weight.fault(masks) is None
    by_rows = np.tile([True, True, False, False], masks.size // 4).reshape(masks.shape)
    by_columns = np.repeat(np.tile([True, True, False, False], masks.size // 4 // 32),
                           32).reshape(masks.shape)
    for wrong in (np.roll(masks, 1, axis=1), by_rows, by_columns):
        assert (wrong.sum(1) == weight.active_per_slice).all()
        compact.mask_bits.copy_(torch.from_numpy(np.packbits(wrong, axis=1)))
        with pytest.raises(ValueError,
                           match="masks of w.out are not 2:4 along rows and columns; use another"):
            compact.index_mask()


def test_plan_is_2_4_and_its_table_says_so(recipe):
    r = recipe(sparsity=HALF)
    plan = Plan.of(r)
    assert plan.sparsity == 0.5 and all(w.pattern == TwoFour() and w.slices == 4
                                        for w in plan.weights.values())
    assert "; 2:4, two of every four weights along rows and along columns" in render_plan(plan)


STAYS_DENSE = [{"weights": "decoder.layers.0.*", "level": 0.0}]


@pytest.mark.parametrize(("sparsity", "model", "said"), [
    (HALF, {}, None),
    ({**HALF, "level": 0.0}, {}, None),
    ({**HALF, "rules": STAYS_DENSE}, {}, None),
    ({**HALF, "level": 0.75}, {},
     r"pattern=2:4 on .*: level=0.75, and two of every four .* are level 0.5; take"),
    ({**HALF, "rules": [{"weights": "*.mlp.*", "level": 0.25}]}, {},
     "linear_fc1.weight .*: level=0.25"),
    (HALF, {"ffn_hidden": 72},
     r"its 4 slices, .* are 18 x 64, and tiles of 4 x 4 must fill them; take a .* of 16,"),
    (HALF, {"hidden": 24, "heads": 4}, r"its 4 slices, .* are 18 x 24, and tiles")])
def test_recipe_is_held_to_what_2_4_allows(recipe, sparsity, model, said):
    found = list(rule_violations(recipe(sparsity=sparsity, model=model)))
    if said is None:
        assert found == []
    else:
        (only,) = found
        assert re.search(said, only), only


@pytest.mark.parametrize("written", ["2:4", '"2:4"', "'2:4'"])
def test_quotes_around_the_pattern_are_optional(written, tmp_path, recipe):
    """YAML 1.1 reads 2:4 as 124."""
    saved = tmp_path / "recipe.yaml"
    save_recipe(recipe(sparsity={**HALF, "seed": 3}), saved)
    text = saved.read_text()
    assert "pattern: '2:4'" in text
    saved.write_text(text.replace("'2:4'", written))
    assert load_recipe(saved).sparsity.pattern == "2:4"
    overridden = load_recipe(saved, ["sparsity.pattern=tile", f"sparsity.pattern={written}"])
    assert (overridden.sparsity.pattern, overridden.sparsity.seed) == ("2:4", 3)


def test_identity_of_a_run_knows_its_pattern_and_no_tile(recipe):
    def identity(**change) -> dict:
        return recipe(sparsity={**HALF, **change}).identity()

    assert identity(tile=16) == identity() != identity(pattern="unstructured")
