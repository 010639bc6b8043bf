"""SµPar's rules, computed by hand for cases of the paper's table; the same GPT with the multipliers
in its weights."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_spdf.architecture.base import EMBEDDING, HEAD
from megatron_spdf.model.parametrization import (
    Parametrization,
    fold,
    render_parametrization,
    unfold,
)
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
OUT = "decoder.layers.1.mlp.linear_fc2.weight"


def rules(**changes) -> tuple[Parametrization, dict]:
    values = {"output": "run", "parametrization": "mup", "sparsity": 0.75,
              "model": {"layers": 2, "hidden": 1024, "heads": 16, "vocab_size": 300},
              "train": {"tokens": 1000, "global_batch": 4, "micro_batch": 1},
              "optimizer": {"lr": 1e-3}, **changes}
    recipe = Recipe.model_validate(values)
    weights = recipe.model.weights()
    plan = Plan.of(recipe)
    return Parametrization(recipe, plan), {w.name: w for w in weights}


def test_four_times_the_width_at_a_quarter_of_the_density_is_the_base():
    found, weights = rules()  # m_d = 1024 / 256 = 4, m_rho = 0.25
    assert found.learning_rate(weights[QKV]) == 1.0
    assert found.initial(weights[QKV]).std == 0.02
    assert found.initial(weights[OUT]).std == pytest.approx(0.02 / math.sqrt(2 * 2))


@pytest.mark.parametrize(("hidden", "level", "base", "growth"), [
    (256, 0.75, {}, 0.25), (256, 0.5, {}, 0.5), (1024, 0.0, {}, 4.0), (2048, 0.875, {}, 1.0),
    (512, 0.9375, {"hidden": 128, "density": 0.25}, 1.0),
    (768, 0.5, {"hidden": 256, "density": 0.5}, 3.0)])
def test_variance_and_learning_rate_go_with_one_over_width_and_density(hidden, level, base, growth):
    model = {"layers": 2, "hidden": hidden, "heads": 16, "vocab_size": 300}
    found, weights = rules(model=model, sparsity=level, mup_base=base)
    for name in (QKV, OUT):
        assert found.learning_rate(weights[name]) == pytest.approx(1 / growth)
        assert found.initial(weights[name]).std ** 2 == pytest.approx(weights[name].std ** 2
                                                                      / growth)


def test_the_density_is_the_one_that_tiles_are_rounded_to():
    model = {"layers": 2, "hidden": 512, "heads": 8, "vocab_size": 300}
    found, weights = rules(model=model, mup_base={"hidden": 256},
                           sparsity={"level": 0.9, "pattern": "tile", "tile": 64})
    assert found.plan.weights[QKV].sparsity == 0.875
    assert found.learning_rate(weights[QKV]) == 1 / (2 * 0.125)
    assert found.initial(weights[QKV]).std == pytest.approx(0.02 / math.sqrt(2 * 0.125))


def test_the_rest_keeps_its_spread_and_rate():
    found, weights = rules(sparsity=0.0)
    for name in (EMBEDDING, "embedding.position_embeddings.weight",
                 "decoder.final_layernorm.weight", QKV.replace("weight", "bias")):
        assert found.learning_rate(weights[name]) == 1.0
        assert found.initial(weights[name]) == weights[name]


def test_multipliers():
    found, _ = rules(mup_base={"hidden": 128, "input_multiplier": 3.0, "output_multiplier": 2.0,
                               "head_width": 16})
    assert found.embedding_output == 3.0
    assert found.head_input == 2.0 / (1024 / 128)
    assert found.attention_scale == 4 / 64


def test_densities_of_several_rules():
    found, weights = rules(sparsity=[{"weights": "*.mlp.*", "level": 0.5}])
    assert found.learning_rate(weights[OUT]) == 1 / (4 * 0.5)
    assert found.learning_rate(weights[QKV]) == 1 / 4


@pytest.mark.parametrize(("level", "density"), [
    (0.0, 1.0), (0.75, 0.25), (0.9, 0.1), (0.7, 0.3), (0.1, 0.9), (0.95, 0.05), (1 / 3, 2 / 3)])
def test_mup_at_the_base_is_standard_in_every_digit(level, density):
    base = {"hidden": 1024, "density": density}
    found, weights = rules(sparsity=level, mup_base=base)
    standard, _ = rules(sparsity=level, parametrization="standard")
    for w in weights.values():
        assert found.initial(w) == standard.initial(w) and found.peak(w) == standard.peak(w)
        assert torch.equal(torch.as_tensor(found.folded(w.name)).unique(), torch.ones(1))
    for name in ("embedding_output", "head_input", "attention_scale"):
        assert getattr(found, name) == getattr(standard, name)


def test_the_density_of_a_base_is_rounded_as_tiles_are():
    model = {"layers": 2, "hidden": 512, "heads": 8, "vocab_size": 300}
    sparsity = {"level": 0.9, "pattern": "tile", "tile": 64}  # an eighth of the tiles
    found, weights = rules(model=model, mup_base={"hidden": 512, "density": 0.1},
                           sparsity=sparsity)
    assert found.learning_rate(weights[QKV]) == 1.0


def test_density_alone():
    base = {"hidden": 64, "density": 0.5}
    found, weights = rules(parametrization="density", mup_base=base)  # a quarter of the weights
    for name in (QKV, OUT):
        assert found.learning_rate(weights[name]) == 2.0
        assert found.initial(weights[name]).std == pytest.approx(weights[name].std * math.sqrt(2))
    assert (found.embedding_output, found.head_input, found.attention_scale) == (1.0, 1.0, 1 / 8)
    assert all(found.folded(name) == 1.0 for name in weights)
    for name in (EMBEDDING, "decoder.final_layernorm.weight", QKV.replace("weight", "bias")):
        assert found.learning_rate(weights[name]) == 1.0
        assert found.initial(weights[name]) == weights[name]


@pytest.mark.parametrize(("given", "embedding", "norm"), [
    ({}, 1e-3, 1e-3), ({"embedding_lr": 2e-2}, 2e-2, 2e-2), ({"norm_lr": 3e-3}, 1e-3, 3e-3),
    ({"embedding_lr": 2e-2, "norm_lr": 3e-3}, 2e-2, 3e-3)])
@pytest.mark.parametrize(("parametrization", "factor"), [("standard", 1.0), ("density", 4.0),
                                                         ("mup", 1.0)])
def test_groups_have_the_rates_of_the_recipe(given, embedding, norm, parametrization, factor):
    found, weights = rules(optimizer={"lr": 1e-3, **given}, parametrization=parametrization)
    for name, peak in {QKV: 1e-3 * factor, EMBEDDING: embedding,
                       "embedding.position_embeddings.weight": embedding,
                       QKV.replace("weight", "bias"): norm, "decoder.final_layernorm.weight": norm,
                       "decoder.layers.0.input_layernorm.bias": norm}.items():
        limits = found.peak(weights[name]).limits(0.25)
        assert limits == {"max_lr": peak, "min_lr": peak / 4}


def test_an_lm_head_of_its_own_goes_with_the_embeddings():
    model = {"architecture": "llama", "layers": 2, "hidden": 64, "heads": 4, "ffn_hidden": 128,
             "embedding_std": 0.5}
    found, weights = rules(model=model, parametrization="density",
                           optimizer={"lr": 1e-3, "embedding_lr": 2e-2, "norm_lr": 5e-3})
    assert EMBEDDING in weights and HEAD in weights
    for name in (EMBEDDING, HEAD):
        assert found.initial(weights[name]).std == 0.5
        assert found.peak(weights[name]).limits(1.0)["max_lr"] == 2e-2
    assert found.peak(weights["decoder.final_layernorm.weight"]).group == 5e-3


def test_spreads_of_layers_and_of_embeddings():
    model = {"layers": 2, "hidden": 256, "heads": 4, "vocab_size": 300, "init_std": 0.03,
             "embedding_std": 0.5}
    for parametrization, factor in (("standard", 1.0), ("density", 2.0), ("mup", 2.0)):
        found, weights = rules(model=model, parametrization=parametrization)
        assert found.initial(weights[EMBEDDING]).std == 0.5
        assert found.initial(weights["embedding.position_embeddings.weight"]).std == 0.5
        assert found.initial(weights[QKV]).std == pytest.approx(0.03 * factor)


def test_standard_changes_nothing():
    found, weights = rules(parametrization="standard", mup_base={
        "hidden": 128, "density": 0.5, "input_multiplier": 3.0, "output_multiplier": 2.0})
    assert all(found.learning_rate(w) == 1.0 and found.initial(w) == w for w in weights.values())
    assert (found.embedding_output, found.head_input, found.attention_scale) == (1.0, 1.0, 1 / 8)
    assert all(found.folded(name) == 1.0 for name in weights)


def test_folding_undone_is_nothing():
    found, weights = rules(mup_base={"hidden": 128, "input_multiplier": 3.0})
    for name in (QKV, EMBEDDING, "decoder.final_layernorm.bias", QKV.replace("weight", "bias")):
        values = torch.randn(weights[name].shape)
        assert torch.allclose(unfold(fold(values, found.folded(name)), found.folded(name)), values)


def test_only_queries_are_scaled():
    found, weights = rules(model={"layers": 2, "hidden": 64, "heads": 4, "query_groups": 2,
                                  "vocab_size": 300}, mup_base={"hidden": 64, "head_width": 4})
    rows = found.folded(QKV).view(2, 4, 16)  # (group, two queries + key + value, d_head)
    assert (rows[:, :2] == 1 / 2).all() and (rows[:, 2:] == 1).all()
    assert found.folded(QKV).shape == weights[QKV].shape[:1]


def test_the_table():
    found, weights = rules(sparsity=[{"weights": "*.mlp.*", "level": 0.5}])
    table = render_parametrization(found.recipe, found.plan, list(weights.values()))
    assert "base width 256, of a head 64, base density 1" in table
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[3:]}
    assert rows["decoder.layers.*.mlp.linear_fc1.weight"] == ["2", "0.5000", "0.01414", "0.5",
                                                              "0.0005"]
    assert rows["decoder.layers.*.self_attention.linear_qkv.weight"][1:] == [
        "1.0000", "0.01", "0.25", "0.00025"]
    assert rows[EMBEDDING] == ["1", "-", "0.02", "1", "0.001"]
    assert rows["norms"] == ["and", "biases", "18", "-", "-", "1", "0.001"]


@pytest.mark.parametrize("changes", [
    {"optimizer": {"lr": 1e-3, "embedding_lr": 2e-2}}, {"optimizer": {"lr": 1e-3, "norm_lr": 2e-2}},
    {"model": {"layers": 2, "hidden": 64, "heads": 4, "embedding_std": 0.1}}], ids=str)
def test_the_table_is_shown_where_groups_differ_under_standard_too(changes):
    found, weights = rules(parametrization="standard", **changes)
    assert render_parametrization(found.recipe, found.plan, list(weights.values())).startswith(
        "parametrization standard\n  weight ")


def test_there_is_no_table_of_one_rate_and_spread():
    found, weights = rules(parametrization="standard")
    assert render_parametrization(found.recipe, found.plan, list(weights.values())) == ""
