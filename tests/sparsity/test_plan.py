"""The plan: which weights are sparse, how sparse, and rules that decide nothing are refused."""

from __future__ import annotations

import re

import pytest

from megatron_spdf.sparsity.algorithms.top_kast import TopKast
from megatron_spdf.sparsity.plan import (
    Plan,
    SparseWeight,
    check_algorithm,
    check_tensor,
    make_plan,
    render_plan,
)
from megatron_spdf.sparsity.settings import Sparsity

TILE = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1",
        "mlp.linear_fc2"]


@pytest.fixture
def plan(recipe):
    """Plans a tiny model of 4 layers, 4 query groups, width 64."""
    model = recipe().model

    def make(sparsity) -> Plan:
        return make_plan(Sparsity.model_validate(sparsity), model.weights(),
                         model.query_groups)
    return make


def levels(plan: Plan) -> dict[str, float]:
    return {name: weight.level for name, weight in plan.weights.items()}


def test_targets_are_the_four_matrices_of_every_tile(plan):
    assert list(plan(0.75).weights) == [f"decoder.layers.{i}.{name}.weight" for i in range(4)
                                        for name in TILE]


def test_shape_and_axis_are_the_weights(plan):
    weights = plan(0.75).weights
    assert [(w.shape, w.axis) for w in list(weights.values())[:4]] == [
        ((192, 64), 0), ((64, 64), 1), ((256, 64), 0), ((64, 256), 1)]
    assert {w.slices for w in weights.values()} == {4}


def test_dense_plan_is_empty(plan):
    assert plan(0.0).weights == {} and plan(0.0).sparsity == 0.0
    assert "dense" in render_plan(plan(0.0))


def test_default_level_is_of_every_weight_that_no_rule_matches(plan):
    found = levels(plan({"level": 0.5, "rules": [{"weights": "*.mlp.*", "level": 0.9}]}))
    assert all(level == (0.9 if ".mlp." in name else 0.5) for name, level in found.items())


def test_first_matching_rule_wins(plan):
    rules = [{"weights": "decoder.layers.0.*", "level": 0.2},
             {"weights": "*.linear_fc1.*", "level": 0.6}, {"weights": "*", "level": 0.4}]
    found = levels(plan(rules))
    assert found["decoder.layers.0.mlp.linear_fc1.weight"] == 0.2
    assert found["decoder.layers.1.mlp.linear_fc1.weight"] == 0.6
    assert found["decoder.layers.1.mlp.linear_fc2.weight"] == 0.4


def test_rule_of_level_zero_keeps_a_weight_dense(plan):
    found = levels(plan({"level": 0.75,
                         "rules": [{"weights": "decoder.layers.3.*", "level": 0.0}]}))
    assert len(found) == 12 and not any(".3." in name for name in found)


def test_glob_is_case_sensitive(plan):
    with pytest.raises(ValueError, match="no weight has such a name"):
        plan([{"weights": "*.MLP.*", "level": 0.5}])


@pytest.mark.parametrize("glob", ["*", "*.weight", "decoder.*"])
def test_glob_over_everything_leaves_embeddings_norms_and_biases_dense(plan, glob):
    assert levels(plan([{"weights": glob, "level": 0.5}])) == levels(plan(0.5))


@pytest.mark.parametrize("glob, why", [
    ("*.attention.*", "no weight has such a name; they look like decoder.layers.0"),
    ("embedding.*", "only embeddings, norms or biases"),
    ("*layernorm*", "only embeddings, norms or biases"),
    ("*.bias", "only embeddings, norms or biases"),
])
def test_rule_that_matches_nothing_sparse_is_refused(plan, glob, why):
    with pytest.raises(ValueError, match=why) as caught:
        plan([{"weights": "*.mlp.*", "level": 0.5}, {"weights": glob, "level": 0.5}])
    assert "sparsity.rules.1" in str(caught.value) and repr(glob) in str(caught.value)


def test_shadowed_rule_is_refused(plan):
    with pytest.raises(ValueError,
                       match=r"sparsity\.rules\.1: .*taken by an earlier rule; put it before"):
        plan([{"weights": "*", "level": 0.5}, {"weights": "*.mlp.*", "level": 0.9}])


@pytest.mark.parametrize("level, shape, axis, slices, k", [
    (0.75, (192, 64), 0, 4, 768), (0.75, (64, 192), 1, 4, 768), (0.5, (6, 5), 0, 2, 8),
    (0.9, (4, 4), 1, 1, 2), (1 / 3, (10, 10), 0, 1, 67), (0.999, (4, 4), 0, 2, 1),
    (0.99999, (2, 2), 1, 2, 1)])
def test_active_per_slice_is_exact_and_at_least_one(level, shape, axis, slices, k):
    weight = SparseWeight("w", shape, axis, slices, level)
    assert (weight.active_per_slice, weight.active) == (k, k * slices)
    assert weight.sparsity == 1 - k * slices / (shape[0] * shape[1])


def test_sparsity_of_the_plan_is_of_all_sparse_weights_together(plan):
    half = plan([{"weights": "*.mlp.linear_fc1.*", "level": 0.5},
                 {"weights": "*.linear_qkv.*", "level": 0.75}])
    assert half.numel == 4 * (256 * 64 + 192 * 64)
    assert half.active == 4 * (256 * 64 // 2 + 192 * 64 // 4)
    assert half.sparsity == pytest.approx(1 - half.active / half.numel)
    assert plan(0.75).sparsity == 0.75


def test_seed_is_the_recipes(plan):
    assert plan({"level": 0.5, "seed": 11}).seed == 11


def test_table_has_a_row_for_each_kind(plan):
    rows = render_plan(plan(0.75)).splitlines()[3:]
    assert [row.split()[:2] for row in rows] == [[f"decoder.layers.*.{name}.weight", "4"]
                                                 for name in TILE]
    assert all(row.endswith("75.0000%") for row in rows)


def test_a_row_by_hand():
    """No two of its figures are equal."""
    made = Plan(9, {f"decoder.layers.{i}.mlp.linear_fc1.weight": SparseWeight(
        f"decoder.layers.{i}.mlp.linear_fc1.weight", (60, 16), 0, 6, 0.25) for i in range(5)})
    rows = render_plan(made).splitlines()
    assert rows[0] == ("sparsity plan (mask seed 9): 3,600 of 4,800 linear weights active, "
                       "sparsity 25.0000%")
    assert [line.split("  ") for line in (re.sub("   +", "  ", row.strip()) for row in rows[3:])
            ] == [["decoder.layers.*.mlp.linear_fc1.weight", "5", "60 x 16", "6", "120",
                   "25.0000%"]]


def test_tensor_parallelism_divides_the_slices_of_every_weight():
    plan = Plan(0, {str(c): SparseWeight(str(c), (24, 8), 0, c, 0.5) for c in (4, 6)})
    check_tensor(plan, 2)
    with pytest.raises(ValueError, match=r"parallel.tensor=3 does not divide the 4 slices .* 4 "
                                         r"\(24 x 8\) at level 0.5; tensor may be a divisor of 2,"):
        check_tensor(plan, 3)
    with pytest.raises(ValueError, match="tensor=4 does not divide the 6 slices .* divisor of 2,"):
        check_tensor(plan, 4)


@pytest.mark.parametrize(("pattern", "allowed", "refused", "said"), [
    # 8 zeros for 24 active entries; of 0.02 of them none would move
    ({}, (0.0, 0.03, 8 / 24), (0.02, 9 / 24), ("0.0417 or more", "fraction to 0.333")),
    # 4 zeros for 4 tiles, which move two by two
    ({"pattern": "tile", "tile": 2}, (0.0, 0.5, 1.0), (0.25,), ("raise .* to 0.5, or",))])
def test_as_many_may_move_as_there_are_zeros(pattern, allowed, refused, said):
    shape = (4, 8)

    def check(fraction: float) -> None:
        sparsity = Sparsity(level=0.5 if pattern else 0.25, algorithm="set",
                            update={"fraction": fraction}, **pattern)
        weight = SparseWeight("w", shape, 0, 1, sparsity.level, sparsity.masks,
                              algorithm=sparsity.update)
        check_algorithm(Plan(0, {"w": weight}), sparsity)

    for fraction in allowed:
        check(fraction)
    for fraction, words in zip(refused, said, strict=True):
        with pytest.raises(ValueError, match=words):
            check(fraction)


def test_top_kast_pulls_by_the_density_that_whole_numbers_reach():
    assert TopKast(penalty=0.5).decay(SparseWeight("w", (2, 3), 0, 1, 0.6)) == (
        0.5, pytest.approx(1.5))  # two of six entries
