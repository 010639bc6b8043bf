"""FLOPs: the numbers of the paper's supplement, Table 2 (Thangarasa et al. 2023)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spdf.config import load_recipe
from megatron_spdf.model.weights import model_weights
from megatron_spdf.planning.flops import training_flops
from megatron_spdf.sparsity.plan import make_plan

PRETRAIN = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
SEQUENCES = {"gpt2_small": 1.22e6, "gpt3_xl": 1.27e7}
TABLE_2 = {  # FLOPs per sequence, total in 1e18, ratio to dense
    "gpt2_small_dense": (1.99e12, 2.43, 1.0),
    "gpt2_small_s50": (1.47e12, 1.79, 0.737),
    "gpt2_small_s75": (1.20e12, 1.46, 0.601),
    "gpt3_xl_dense": (1.86e13, 236.10, 1.0),
    "gpt3_xl_s50": (1.12e13, 141.87, 0.601),
    "gpt3_xl_s75": (7.46e12, 94.76, 0.401),
}


def per_sequence(name: str, counted_as_dense: bool = False) -> float:
    recipe = load_recipe(PRETRAIN / f"{name}.yaml")
    plan = make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups)
    length = recipe.train.sequence_length
    return length * training_flops(recipe.model, length, None if counted_as_dense else plan).total


def size(name: str) -> str:
    return name.rpartition("_")[0]


@pytest.mark.parametrize("name", TABLE_2)
def test_flops_per_sequence(name):
    assert per_sequence(name) == pytest.approx(TABLE_2[name][0], rel=0.015)


@pytest.mark.parametrize("name", TABLE_2)
def test_total_flops(name):
    assert SEQUENCES[size(name)] * per_sequence(name) / 1e18 == pytest.approx(TABLE_2[name][1], rel=0.015)


@pytest.mark.parametrize("name", TABLE_2)
def test_ratio_to_dense(name):
    assert per_sequence(name) / per_sequence(f"{size(name)}_dense") == pytest.approx(TABLE_2[name][2], abs=0.005)


@pytest.mark.parametrize("name", ["gpt2_small_dense", "gpt3_xl_dense"])
def test_sequences_are_those_of_the_recipe(name):
    recipe = load_recipe(PRETRAIN / f"{name}.yaml")
    assert recipe.steps * recipe.train.global_batch == pytest.approx(SEQUENCES[size(name)], rel=0.005)


def test_speed_up_of_gpt3_xl_at_75_percent():
    assert per_sequence("gpt3_xl_dense") / per_sequence("gpt3_xl_s75") == pytest.approx(2.5, abs=0.05)


def test_expanded_weights_cost_what_dense_ones_do():
    assert per_sequence("gpt3_xl_s75", counted_as_dense=True) == per_sequence("gpt3_xl_dense")


def test_parts_follow_the_formula(recipe):
    model = recipe().model
    layers, width, length, vocabulary = 4, 64, 32, 256
    flops = training_flops(model, length)
    assert flops.linear == 72 * layers * width**2
    assert flops.attention == 12 * layers * length * width
    assert flops.logits == 6 * vocabulary * width
    assert flops.total == flops.linear + flops.attention + flops.logits
