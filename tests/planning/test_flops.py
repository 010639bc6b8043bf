"""FLOPs: every cell of the paper's tables (Thangarasa et al. 2023), and the parts of the count by
themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.reports import paper
from megatron_spdf.schedule.flops import (
    Ramp,
    average_sparsity,
    forward_flops,
    gradual_pruning,
    schedule_flops,
    training_flops,
)
from megatron_spdf.sparsity.plan import Plan

PRETRAIN = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
FILES = {0.0: "dense", 0.5: "s50", 0.75: "s75"}
CELLS = [(model, level) for model in paper.PRETRAINING for level in FILES]
WITHIN = 0.015


def per_sequence(model: str, level: float, counted_as_dense: bool = False) -> float:
    recipe = load_recipe(PRETRAIN / f"{model}_{FILES[level]}.yaml")
    plan = Plan.of(recipe)
    length = recipe.train.sequence_length
    return length * training_flops(recipe.model, length, None if counted_as_dense else plan).total


def fine_tuning(model: str) -> float:
    """FLOPs of a sequence of the paper's fine-tuning: forward only, see paper.CONTRADICTIONS."""
    recipe = load_recipe(PRETRAIN / f"{model}_dense.yaml")
    return paper.FINE_TUNING_LENGTH * forward_flops(recipe.model, paper.FINE_TUNING_LENGTH).total


@pytest.mark.parametrize(("model", "level"), CELLS)
def test_pre_training(model, level):
    each, total, ratio = paper.PRETRAINING[model][level]
    assert per_sequence(model, level) == pytest.approx(each, rel=WITHIN)
    assert paper.SEQUENCES[model] * per_sequence(model,
                                                 level) / 1e18 == pytest.approx(total, rel=WITHIN)
    assert per_sequence(model, level) / per_sequence(model, 0.0) == pytest.approx(ratio, rel=WITHIN)


@pytest.mark.parametrize("model", paper.FINE_TUNING)
def test_fine_tuning_per_sequence(model):
    assert fine_tuning(model) == pytest.approx(paper.FINE_TUNING[model][0], rel=WITHIN)


def small_total_from_xl(task: str) -> float:
    """GPT-2 Small's total from GPT-3 XL's cell: the number of sequences is not printed, but it is
    the task's."""
    sequences = 1e18 * paper.FINE_TUNING["gpt3_xl"][1][task] / fine_tuning("gpt3_xl")
    return sequences * fine_tuning("gpt2_small") / 1e18


@pytest.mark.parametrize("task", ["WebNLG", "DART", "Curation"])
def test_fine_tuning_totals_agree_between_models(task):
    printed = paper.FINE_TUNING["gpt2_small"][1][task]
    # three decimals are printed
    assert small_total_from_xl(task) == pytest.approx(printed, abs=0.0005)


def test_fine_tuning_totals_of_e2e_contradict_each_other():
    assert "E2E" in paper.CONTRADICTIONS[0].cells
    assert round(small_total_from_xl("E2E"),
                 3) == 0.051 != paper.FINE_TUNING["gpt2_small"][1]["E2E"]


@pytest.mark.parametrize(("model", "level"), CELLS)
def test_pre_training_and_fine_tuning_together(model, level):
    total, speed_up = paper.TOGETHER[model][level]
    tuning = paper.FINE_TUNING[model][1]["E2E"]

    def together(at: float) -> float:
        return paper.SEQUENCES[model] * per_sequence(model, at) / 1e18 + tuning

    assert together(level) == pytest.approx(total, rel=WITHIN)
    assert together(0.0) / together(level) == pytest.approx(speed_up, rel=WITHIN)


@pytest.mark.parametrize("model", paper.PRETRAINING)
def test_sequences_are_those_of_the_recipe(model):
    recipe = load_recipe(PRETRAIN / f"{model}_dense.yaml")
    assert recipe.steps * recipe.train.global_batch == pytest.approx(paper.SEQUENCES[model],
                                                                     rel=0.005)


def test_speed_up_of_gpt3_xl_at_75_percent():
    assert per_sequence("gpt3_xl", 0.0) / per_sequence("gpt3_xl",
                                                       0.75) == pytest.approx(2.5, abs=0.05)


def test_shares_of_attention_and_vocabulary_are_not_those_of_the_text():
    recipe = load_recipe(PRETRAIN / "gpt2_small_dense.yaml")
    flops = training_flops(recipe.model, recipe.train.sequence_length)
    assert flops.attention / flops.total == pytest.approx(0.234, abs=0.002)  # the text says 0.133
    assert flops.logits / flops.total == pytest.approx(0.239, abs=0.002)  # the text says 0.27


def test_expanded_weights_cost_what_dense_ones_do():
    assert per_sequence("gpt3_xl", 0.75, counted_as_dense=True) == per_sequence("gpt3_xl", 0.0)


def test_parts_follow_the_formula(recipe):
    model = recipe().model
    layers, width, length, vocabulary = 4, 64, 32, 256
    flops = training_flops(model, length)
    assert flops.linear == 72 * layers * width**2
    assert flops.attention == 12 * layers * length * width
    assert flops.logits == 6 * vocabulary * width
    assert flops.total == flops.linear + flops.attention + flops.logits


def test_causal_convention_counts_the_keys_that_a_query_sees(recipe):
    model, length = recipe().model, 32
    seen = np.tril(np.ones((length, length))).sum()  # of all T x T scores
    whole, causal = (forward_flops(model, length, None, c) for c in ("spdf", "causal"))
    assert causal.attention / whole.attention == pytest.approx(seen / length**2)
    assert (causal.linear, causal.logits) == (whole.linear, whole.logits)


def test_backward_costs_two_forward_passes_and_recomputation_one(recipe):
    model = recipe().model
    once = forward_flops(model, 32)
    for recompute, linear, attention in (("none", 3, 3), ("selective", 3, 4), ("full", 4, 4)):
        flops = training_flops(model, 32, recompute=recompute)
        assert (flops.linear, flops.attention) == (linear * once.linear, attention * once.attention)
        assert flops.logits == 3 * once.logits


@pytest.mark.parametrize("stages",
                         [gradual_pruning(0.8), [Ramp(1, 0.5, 0.5)],
                          [Ramp(3, 0.0, 0.9, power=2.0)],
                                    [Ramp(0.1, 0.0, 0.0), Ramp(0.2, 0.8, 0.8),
                                     Ramp(0.1, 0.0, 0.0)]])
def test_average_sparsity_is_the_integral_of_the_schedule(stages):
    total, t = sum(p.share for p in stages), (np.arange(100_000) + 0.5) / 100_000
    curves = [(p.share / total) * np.mean(p.end + (p.start - p.end) * (1 - t) ** p.power)
              for p in stages]
    assert average_sparsity(stages) == pytest.approx(sum(curves), abs=1e-9)


def test_gradual_pruning_costs_what_the_paper_says(recipe):
    model = recipe().model
    dense = training_flops(model, 32)
    for level in (0.5, 0.75, 0.875):
        flops = schedule_flops(model, 32, gradual_pruning(level))
        assert flops.linear == pytest.approx((1 - 0.625 * level) * dense.linear)
        assert (flops.attention, flops.logits) == (dense.attention, dense.logits)


def test_a_static_schedule_costs_what_the_plan_does(recipe):
    r = recipe(sparsity=0.75)
    plan = Plan.of(r)
    assert schedule_flops(r.model, 32,
                          [Ramp(1.0, 0.75, 0.75)]) == training_flops(r.model, 32, plan)


def test_dense_gradients_of_rigl(recipe):
    model, every = recipe().model, 100
    sparse, dense = (forward_flops(model, 32).linear * density for density in (0.2, 1.0))
    flops = schedule_flops(model, 32, [Ramp(1.0, 0.8, 0.8)], dense_gradient_every=every)
    assert flops.linear == pytest.approx((3 * sparse * every + 2 * sparse + dense) / (every + 1))


@pytest.mark.parametrize("stages", [[], [Ramp(0.0, 0.5, 0.5)]])
def test_a_schedule_needs_stages(stages):
    with pytest.raises(ValueError, match="positive share"):
        average_sparsity(stages)
