"""What a plan says of moving masks."""

from __future__ import annotations

import pytest

from megatron_spdf.optimizers.adamw import AdamW
from megatron_spdf.planning.moves import render_moves
from megatron_spdf.sparsity.plan import Plan


@pytest.mark.parametrize(("beta1", "beta2", "peak"), [
    (0.9, 0.999, 6.57), (0.9, 0.99, 2.13), (0.9, 0.98, 1.55), (0.9, 0.95, 1.10),
    (0.95, 0.95, 1.00)])
def test_first_updates_of_the_born_are_those_of_adam_run_for_long(beta1, beta2, peak):
    """An entry with zero moments at step 10,000 beside one that had its gradient from the start."""
    import torch

    entries = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([entries], lr=1.0, betas=(beta1, beta2), eps=0.0)
    adam.state[entries] = {"step": torch.tensor(10_000.0), "exp_avg": torch.tensor([0.0, 1.0]),
                           "exp_avg_sq": torch.tensor([0.0, 1.0])}
    largest = 0.0
    for _ in range(300):
        before, entries.grad = entries.detach().clone(), torch.ones(2)
        adam.step()
        born, steady = (before - entries.detach()).tolist()
        largest = max(largest, born / steady)
    assert largest == pytest.approx(peak, abs=6e-3)
    found = AdamW(lr=1e-3, beta1=beta1, beta2=beta2).largest_first_updates
    assert found == pytest.approx(largest, abs=6e-3)


def test_a_plan_says_so_where_it_matters(recipe):
    sparsity = {"level": 0.75, "algorithm": "set", "update": {"every": 2, "newborn": "plain"}}
    slow = recipe(sparsity=sparsity, optimizer={"beta2": 0.999})
    ages = sparsity | {"update": {"every": 2, "newborn": "ages"}}
    counted = recipe(sparsity=ages, optimizer={"beta2": 0.999})
    quick = recipe(sparsity=sparsity, optimizer={"beta2": 0.95})
    said = "warning: first updates of weights that are born are up to 6.6 times the usual"
    assert said in render_moves(slow, Plan.of(slow))
    assert "a step count of its own for Adam's bias correction: an age for every value" in (
        render_moves(counted, Plan.of(counted)))
    assert counted.state_bytes == slow.state_bytes + 4
    assert "3 moves in 10 steps" in render_moves(quick, Plan.of(quick))
    assert "first updates" not in render_moves(quick, Plan.of(quick))


def test_pruning_has_no_cost_of_moves(recipe):
    pruned = recipe(sparsity={"level": 0.75, "algorithm": "gmp", "update": {"every": 1}})
    assert render_moves(pruned, Plan.of(pruned)) == (
        "mask algorithm gmp: smallest magnitudes die every 1 steps, by a cubic from 25% to 75% of "
        "the steps; 6 moves in 10 steps")
