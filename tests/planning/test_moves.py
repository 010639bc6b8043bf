"""What a plan says of moving masks."""

from __future__ import annotations

import pytest

from megatron_spdf.optimizers.adamw import AdamW
from megatron_spdf.planning.moves import moves_of, render_moves, transient_bytes
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


def test_moves_are_rendered_by_the_fullest_stage(recipe):
    """Each figure is the largest over pipeline stages; FLOPs are of the whole run."""
    r = recipe(sparsity={"level": 0.75, "algorithm": "rigl", "update": {"every": 2}},
               model={"vocab_size": 5000}, parallel={"pipeline": 2, "data": 2})
    plan = Plan.of(r)
    first, last = (moves_of(r, plan, stage) for stage in (0, 1))
    carried, reduced, held = (max(getattr(m, key) for m in (first, last)) / 2**20
                              for key in ("carried", "reduced", "transient"))
    text = render_moves(r, plan)
    assert text.splitlines()[0].endswith("; 3 moves in 10 steps") and "algorithm rigl" in text
    assert (f"in a move, per GPU: {carried:,.1f} MiB of state gathered, {reduced:,.1f} MiB summed "
            f"up, {held:,.1f} MiB held for the step; over the run {first.flops:.3%} more FLOPs"
            ) in text
    assert first.carried != last.carried and reduced > 0 and held > 0
    alone = r.model_copy(update={"parallel": r.parallel.model_copy(update={"data": 1})})
    found = moves_of(alone, plan, 0)
    assert (found.reduced, found.carried) == (0, 0) and found.transient == first.transient
    whole = r.model_copy(update={"parallel": r.parallel.model_copy(update={"zero_stage": 0})})
    assert moves_of(whole, plan, 0).carried == 0


@pytest.mark.parametrize(("every", "count"), [(2, 3), (1, 7), (100, 0)])
def test_flops_of_moves_are_those_of_masked_entries_over_the_runs(recipe, every, count):
    """A dense gradient takes two more FLOPs a token for every masked entry, in `count` of 10 steps;
    training takes six for every active weight, and for every key of a query's width."""
    r = recipe(sparsity={"level": 0.75, "algorithm": "rigl", "update": {"every": every}})
    linear, head, attention = 4 * 12 * 64 * 64, 256 * 64, 4 * 2 * 64 * 32
    more = count * 2 * 0.75 * linear
    training = 10 * 6 * (0.25 * linear + head + attention)
    assert moves_of(r, Plan.of(r), 0).flops == pytest.approx(more / training)


@pytest.mark.parametrize(("beta2", "said"), [(0.98, True), (0.975, False)])
def test_first_updates_are_worth_a_line_from_half_more_on(recipe, beta2, said):
    plain = {"every": 2, "newborn": "plain"}
    r = recipe(sparsity={"level": 0.75, "algorithm": "set", "update": plain},
               optimizer={"beta2": beta2})
    assert (r.optimizer.largest_first_updates >= 1.5) == said
    assert ("first updates" in render_moves(r, Plan.of(r))) == said


def test_masks_that_stay_or_never_move_cost_nothing(recipe):
    static = recipe(sparsity=0.5)
    assert render_moves(static, Plan.of(static)) == ""
    never = recipe(sparsity={"level": 0.75, "algorithm": "set", "update": {"every": 100}})
    assert render_moves(never, Plan.of(never)).startswith("mask algorithm set: ")
    assert "moves in" not in render_moves(never, Plan.of(never))


def test_on_tiles_a_dense_gradient_is_made_for_the_sum(recipe):
    """Their product forms that of active tiles alone; where weights are expanded it is there."""
    moving = {"level": 0.75, "algorithm": "rigl", "update": {"every": 2, "fraction": 0.5}}
    model, short = {"hidden": 128, "heads": 4, "query_groups": 2}, {"precision": "bf16"}
    tiles, entries = (recipe(sparsity=moving | pattern, model=model, train=short)
                      for pattern in ({"pattern": "tile", "tile": 16}, {}))
    plan = Plan.of(tiles)
    sums = 4 * plan.numel
    largest = max(w.numel for w in plan.weights.values())
    assert transient_bytes(tiles, plan, 0) == sums + 2 * largest
    assert transient_bytes(entries, Plan.of(entries), 0) == sums
    still = recipe(sparsity=moving | {"pattern": "tile", "tile": 16, "algorithm": "set"},
                   model=model, train=short)
    assert transient_bytes(still, plan, 0) == 0
