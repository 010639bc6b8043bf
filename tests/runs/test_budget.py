"""Widths and tokens that a budget gives, counted by hand."""

from __future__ import annotations

import pytest
from test_experiment import RECIPE

from megatron_spdf.recipe.load import make_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.budget import active_weights, average_weights, linear_weights, sized

LLAMA = {"model": {"architecture": "llama", "layers": 2, "hidden": 64, "heads": 4,
                   "ffn_hidden": 96, "vocab_size": 300, "max_positions": 32}}


def load(values: dict, recipe=RECIPE) -> Recipe:
    return make_recipe(recipe, [f"{key}={value}" for key, value in values.items()], "here")


@pytest.mark.parametrize(("level", "width"), [(0.0, 32), (0.75, 64), (0.9375, 128), (0.5, 46)])
def test_a_sparse_model_is_as_wide_as_gives_it_the_active_weights_of_the_dense(level, width):
    """Of 2 layers are 24 d^2 weights, so d is 32 / sqrt(density), to a multiple of two heads."""
    values = sized({"sparsity.level": level, "budget": "weights"}, load)
    recipe = load(values)
    assert recipe.model.hidden == width and recipe.model.ffn_hidden == 4 * width
    assert recipe.model.layers == 2 and recipe.model.heads == RECIPE["model"]["heads"]
    assert active_weights(recipe) == pytest.approx(24 * 32**2, rel=0.04)


def test_a_gated_feed_forward_layer_keeps_its_proportion():
    recipe = load(sized({"sparsity.level": 0.75, "budget": "weights"},
                        lambda values: load(values, RECIPE | LLAMA)), RECIPE | LLAMA)
    model = recipe.model
    assert (model.hidden, model.ffn_hidden, model.head_width) == (128, 192, 32)
    dense = load({}, RECIPE | LLAMA)
    assert active_weights(recipe) == linear_weights(dense)


def test_tokens_are_so_many_for_each_active_weight_in_whole_steps():
    values = sized({"sparsity.level": 0.75, "tokens_per_weight": 2.5}, load)
    assert values["train.tokens"] == 60 * 256  # 2.5 x 24 x 32^2 / 4 are 15,360
    wide = sized({"sparsity.level": 0.75, "tokens_per_weight": 2.5, "budget": "weights"}, load)
    assert (wide["model.hidden"], wide["train.tokens"]) == (64, 240 * 256)
    assert sized({"sparsity.level": 0.75}, load) == {"sparsity.level": 0.75}


@pytest.mark.parametrize("ratio", [0, -1, True, "many"])
def test_what_is_no_number_of_tokens_is_refused(ratio):
    with pytest.raises(ValueError, match=f"tokens_per_weight={ratio} must be a number over 0"):
        sized({"tokens_per_weight": ratio}, load)


def test_average_weights_of_gradual_pruning_by_hand():
    """Dense for 25 of 100 steps, then by the cubic of every step up to 75%."""
    gmp = {"sparsity.level": 0.75, "sparsity.algorithm": "gmp", "sparsity.update.every": 1,
           "train.tokens": 100 * 256}
    recipe = load(gmp)
    shares = [recipe.sparsity.update.share(step, 100) for step in range(1, 101)]
    assert shares[0] == 0.0 and shares[-1] == 1.0
    # each weight's number of active entries is a whole one
    assert average_weights(recipe) == pytest.approx(
        24 * 32**2 * (1 - 0.75 * sum(shares) / 100), rel=1e-3)
    assert active_weights(recipe) == 24 * 32**2 / 4
    assert average_weights(load({"sparsity.level": 0.75})) == 24 * 32**2 / 4
