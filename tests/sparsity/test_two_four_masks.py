"""2:4: transposable masks of a stored stream, compact weights of them, the recipe's rules."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megatron_spdf.recipe.load import load_recipe, save_recipe
from megatron_spdf.sparsity.patterns.two_four import TwoFour, draw_two_four
from megatron_spdf.sparsity.plan import Plan, SparseWeight, render_plan

NAME = "decoder.layers.0.mlp.linear_fc1.weight"
HALF = {"level": 0.5, "pattern": "2:4"}
def tiles(mask: np.ndarray) -> np.ndarray:
    """(tiles, 4, 4)."""
    rows, columns = mask.shape
    return mask.reshape(rows // 4, 4, columns // 4, 4).swapaxes(1, 2).reshape(-1, 4, 4)


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


def test_largest_mask_keeps_the_most_of_every_tile():
    """Against all 90 tiles, one by one."""
    possible = [np.array(rows) for rows in itertools.product(
        [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2], repeat=4)
        if all(sum(column) == 2 for column in zip(*rows, strict=True))]
    weight = SparseWeight("w.out", (48, 32), 0, 4, 0.5, TwoFour())
    values = np.random.default_rng(0).normal(size=weight.slice_shape).astype(np.float32)
    mask = weight.largest(values.reshape(-1))
    assert weight.fault(mask[None]) is None
    kept = tiles(np.abs(values) * mask.reshape(values.shape)).sum((1, 2))
    best = [max((tile * each).sum() for each in possible) for tile in tiles(np.abs(values))]
    assert kept == pytest.approx(np.array(best), rel=1e-6)


def test_plan_is_2_4_and_its_table_says_so(recipe):
    r = recipe(sparsity=HALF)
    plan = Plan.of(r)
    assert plan.sparsity == 0.5 and all(w.pattern == TwoFour() and w.slices == 4
                                        for w in plan.weights.values())
    assert "; 2:4, two of every four weights along rows and along columns" in render_plan(plan)


@pytest.mark.parametrize("written", ["2:4", '"2:4"', "'2:4'"])
def test_quotes_around_the_pattern_are_optional(written, tmp_path, recipe):
    """YAML 1.1 would read 2:4 as 124."""
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
