"""Keys of an experiment's labels that size a run by what it costs, instead of saying it:

    budget: tokens            as the recipe says, the default
    budget: flops             as many tokens as cost the FLOPs of the dense model for the recipe's
    budget: weights           as wide as gives the active weights of the dense model
    tokens_per_weight: 20     so many tokens for each active weight

Active weights are those of linear layers, at the end of the run. A wider model keeps its layers and
its heads, and the proportion of its feed-forward layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.schedule.stages import mean_flops, stages_of
from megatron_spdf.sparsity.plan import Plan

BUDGET, TOKENS_PER_WEIGHT = "budget", "tokens_per_weight"
TOKENS = "train.tokens"
Load = Callable[[dict[str, Any]], Recipe]


def sized(values: dict[str, Any], load: Load) -> dict[str, Any]:
    """Values of a run whose width and tokens are those that its budget gives.

    Args:
        values: key of the recipe, or of this module -> value.
        load: makes a recipe of values without keys of this module.

    Raises:
        ValueError: a budget is unknown, or gives no number of tokens.
    """
    values = dict(values)
    budget, ratio = values.pop(BUDGET, "tokens"), values.pop(TOKENS_PER_WEIGHT, None)
    if budget not in ("tokens", "flops", "weights"):
        raise ValueError(f"{BUDGET}={budget} must be tokens, flops or weights")
    if ratio is not None and (not isinstance(ratio, int | float) or isinstance(ratio, bool)
                              or not ratio > 0):
        raise ValueError(f"{TOKENS_PER_WEIGHT}={ratio} must be a number over 0")
    if budget == "tokens" and ratio is None:
        return values
    recipe = load(values)
    if budget == "weights":
        wide = _as_many_weights(recipe)
        values |= _width(recipe, wide)
        recipe = _widened(recipe, wide)
    if ratio is not None:
        recipe = _with_tokens(recipe, ratio * active_weights(recipe))
    if budget == "flops":
        dense = training_flops(recipe.model, recipe.train.sequence_length).total
        recipe = _with_tokens(recipe, recipe.steps * recipe.tokens_per_step * dense
                              / mean_flops(stages_of(recipe)).total)
    if ratio is not None or budget == "flops":
        values[TOKENS] = recipe.train.tokens
    return values


def active_weights(recipe: Recipe) -> int:
    """Linear weights that are not zero at the end of a run."""
    plan = Plan.of(recipe)
    return linear_weights(recipe) - plan.numel + plan.active


def linear_weights(recipe: Recipe) -> int:
    """Linear weights of a model, zero or not."""
    return sum(w.numel for w in recipe.model.weights() if w.linear)


def average_weights(recipe: Recipe) -> float:
    """Mean over a run's tokens of the linear weights that are not zero."""
    stages = stages_of(recipe)
    zeros = sum((s.mean_plan.numel - s.mean_plan.active) * s.tokens for s in stages)
    return linear_weights(recipe) - zeros / sum(s.tokens for s in stages)


def _with_tokens(recipe: Recipe, tokens: float) -> Recipe:
    """A recipe of so many tokens, in whole steps."""
    step = recipe.tokens_per_step
    train = recipe.train.model_copy(update={"tokens": max(1, round(tokens / step)) * step})
    return recipe.model_copy(update={"train": train})


def _as_many_weights(narrow: Recipe) -> int:
    """Width with which a sparse model has the active weights of the dense one, as near as whole
    numbers of a head come."""
    wanted, model = linear_weights(narrow), narrow.model
    unit = model.heads * (2 if model.positions == "rotary" else 1)  # it turns pairs of a head

    def distance(width: int) -> float:
        if width <= 0:
            return math.inf
        return abs(math.log(active_weights(_widened(narrow, width)) / wanted))

    guess = model.hidden * math.sqrt(wanted / active_weights(narrow))
    best = max(1, round(guess / unit)) * unit
    while distance(better := min(best - unit, best + unit, key=distance)) < distance(best):
        best = better
    return best


def _widened(narrow: Recipe, width: int) -> Recipe:
    """The recipe with another width."""
    if width == narrow.model.hidden:
        return narrow
    own = {key.partition(".")[2]: value for key, value in _width(narrow, width).items()}
    model = type(narrow.model)(**{**narrow.model.model_dump(), "ffn_hidden": 4 * width, **own})
    return narrow.model_copy(update={"model": model})


def _width(narrow: Recipe, width: int) -> dict[str, int]:
    """Keys of a width and their values; none where it is the recipe's."""
    model = narrow.model
    if width == model.hidden:
        return {}
    values, ratio = {"model.hidden": width}, width / model.hidden
    if model.gated or model.ffn_hidden != 4 * model.hidden:
        values["model.ffn_hidden"] = round(ratio * model.ffn_hidden / model.slices) * model.slices
    if "head_width" in type(model).model_fields:
        values["model.head_width"] = round(ratio * model.head_width / 2) * 2
    return values
