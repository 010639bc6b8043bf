"""What is measured is held to the plan."""

from __future__ import annotations

import pytest

from megatron_spdf.layers.measure import SparsityDrift, check_sparsity, total_sparsity
from megatron_spdf.sparsity.plan import Plan


@pytest.mark.parametrize("level", [0.0, 0.75])
@pytest.mark.parametrize(("off", "drifts"), [(0.0, False), (5e-4, False), (-5e-4, False),
                                             (2e-3, True), (-2e-3, True)])
def test_a_weight_may_be_a_thousandth_off_and_no_more(recipe, level, off, drifts):
    plan = Plan.of(recipe(sparsity={"level": level, "rules": [{"weights": "*.mlp.*",
                                                               "level": 0.25}]}))
    planned = {name: weight.sparsity for name, weight in plan.weights.items()}
    *_, last = planned
    measured = planned | {last: planned[last] + off}
    if drifts:
        with pytest.raises(SparsityDrift, match=f"{last}: .* measured {measured[last]:.6f}"):
            check_sparsity(measured, plan)
    else:
        check_sparsity(measured, plan)


@pytest.mark.parametrize(("count", "more"), [(1, ""), (4, ""), (5, "; and 1 others"),
                                             (7, "; and 3 others")])
def test_four_weights_are_named_and_others_counted(recipe, count, more):
    plan = Plan.of(recipe(sparsity=0.75))
    names = list(plan.weights)
    measured = {name: 0.75 + 0.01 * (number < count) for number, name in enumerate(names)}
    with pytest.raises(SparsityDrift) as drift:
        check_sparsity(measured, plan)
    named = "; ".join(f"{name}: planned 0.750000, measured 0.760000" for name in names[:count][:4])
    assert str(drift.value).endswith(f"from the last checkpoint. {named}{more}")


def test_the_whole_counts_weights_by_their_size(recipe):
    plan = Plan.of(recipe(sparsity={"level": 0.5, "rules": [{"weights": "*.mlp.*",
                                                             "level": 0.75}]}))
    planned = {name: weight.sparsity for name, weight in plan.weights.items()}
    # attention has 4 h^2 weights and the feed-forward layer 8 h^2
    assert total_sparsity(planned, plan) == pytest.approx((4 * 0.5 + 8 * 0.75) / 12, abs=1e-6)
    assert total_sparsity({}, Plan.of(recipe(sparsity=0.0))) == 0.0
