"""The engine that a recipe names."""

from __future__ import annotations

from torch import device

from megatron_spdf.engine.base import Engine
from megatron_spdf.model.init import InitialWeights
from megatron_spdf.recipe.recipe import ENGINES, Recipe
from megatron_spdf.sparsity.plan import Plan


def make_engine(recipe: Recipe, plan: Plan, where: device,
                weights: InitialWeights | None = None) -> Engine:
    """Builds the engine that the recipe names.

    Args:
        where: this rank's device.
        weights: to start from; None: drawn anew.

    Raises:
        ValueError: the micro-batch is left to a run, and this is none.
    """
    if recipe.train.micro_batch == "auto":
        raise ValueError("train.micro_batch=auto is for pretrain.py, which tries what is fastest; "
                         "set a number here")
    return ENGINES.get(recipe.engine).load()(recipe, plan, where, weights)
