"""Initialization, learning rates and multipliers that keep activations and updates at one size,
whatever the width and the density: SµPar (Dey et al. 2024, arXiv 2405.15743, table 1), which is µP
(Yang et al. 2021) where all is dense.

With m_d = width / base width and m_rho = density of a weight / base density:

    linear weights       initial variance x 1 / (m_d m_rho), AdamW's learning rate x 1 / (m_d m_rho)
    embeddings           output x input_multiplier
    LM head              input x output_multiplier / m_d
    attention            Q K^T / d_head instead of / sqrt(d_head)
    the rest             as it is

Weight decay is the same number for every weight, so that what it takes off in a step goes with the
weight's learning rate, AdamW's usual coupling. Pure Python beside the folding of a model's
multipliers into its weights.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_spdf.architecture.base import Weight
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import any_layer


@dataclass(frozen=True)
class Parametrization:
    """The rules for one recipe and plan; `parametrization: standard` changes nothing."""

    recipe: Recipe
    plan: Plan

    @property
    def _maximal(self) -> bool:
        return self.recipe.parametrization == "mup"

    def _growth(self, weight: Weight) -> float:
        """m_d m_rho of a linear weight; 1 for others and under `standard`."""
        if not self._maximal or not weight.linear:
            return 1.0
        base, planned = self.recipe.mup_base, self.plan.weights.get(weight.name)
        return self._width * _density(planned) / base.density

    @property
    def _width(self) -> float:
        """m_d."""
        return self.recipe.model.hidden / self.recipe.mup_base.hidden if self._maximal else 1.0

    def initial(self, weight: Weight) -> Weight:
        """The weight with the spread of its initial values."""
        return (
            weight
            if weight.std is None
            else replace(weight, std=weight.std / math.sqrt(self._growth(weight)))
        )

    def learning_rate(self, weight: Weight) -> float:
        """Over the recipe's."""
        if not self._maximal:
            return 1.0
        return self.recipe.optimizer.mup_rate(weight.linear, self._width, self._growth(weight))

    @property
    def embedding_output(self) -> float:
        return self.recipe.mup_base.input_multiplier if self._maximal else 1.0

    @property
    def head_input(self) -> float:
        return self.recipe.mup_base.output_multiplier / self._width if self._maximal else 1.0

    @property
    def attention_scale(self) -> float:
        """What Q K^T is multiplied by."""
        head = self.recipe.model.head_width
        return 1.0 / head if self._maximal else 1.0 / math.sqrt(head)

    def folded(self, name: str) -> Tensor | float:
        """What a parameter is multiplied by to make a standard model that computes the same: rows
        of one factor each.

        Args:
            name: canonical.

        Returns:
            A number, or (rows of the parameter,).
        """
        if not self._maximal:
            return 1.0
        model = self.recipe.model
        queries = self.attention_scale * math.sqrt(model.head_width)
        factor = model.folded(name, self.embedding_output, self.head_input, queries)
        return factor if isinstance(factor, float) else torch.tensor(factor)


def fold(values: Tensor, factor: Tensor | float) -> Tensor:
    """A parameter with `Parametrization.folded` in it."""
    if isinstance(factor, float):
        return values if factor == 1.0 else values * factor
    return values * factor.to(values.dtype).view(-1, *[1] * (values.ndim - 1))


def unfold(values: Tensor, factor: Tensor | float) -> Tensor:
    """`fold` undone."""
    return fold(values, 1.0 / factor)


def _density(planned: SparseWeight | None) -> float:
    """Of a weight as planned."""
    return 1.0 if planned is None else planned.density


def render_parametrization(recipe: Recipe, plan: Plan, weights: list[Weight]) -> str:
    """The rules of a recipe as a table, layers of one kind and density in one row; nothing under
    `standard`."""
    if recipe.parametrization == "standard":
        return ""
    rules, base = Parametrization(recipe, plan), recipe.mup_base
    columns = [Column("weight"), Column("count", form="d"), Column("density", form=".4f"),
               Column("initial std", form=".4g"), Column("learning rate x", form=".4g")]
    said = (f"parametrization mup, base width {base.hidden}, base density {base.density:g}: "
             f"embeddings x {rules.embedding_output:g}, LM head's input x {rules.head_input:g}, Q "
             f"K^T x {rules.attention_scale:g}")
    counts = Counter((any_layer(weight.name), _density(plan.weights.get(weight.name)),
                      rules.initial(weight).std, rules.learning_rate(weight))
                     for weight in weights if weight.linear)
    rows = [dict(zip((column.title for column in columns), (kind, count, *values), strict=True))
            for (kind, *values), count in counts.items()]
    return f"{said}\n{Table(columns, rows).text('  ')}"
