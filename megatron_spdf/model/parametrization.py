"""Initialization, learning rates and multipliers that keep activations and updates at one size,
whatever the width and the density: SµPar (Dey et al. 2024, arXiv 2405.15743, table 1), which is µP
(Yang et al. 2021) where all is dense.

With m_d = width / base width and m_rho = density of a weight / base density:

    linear weights       initial variance x 1 / (m_d m_rho), AdamW's learning rate x 1 / (m_d m_rho)
    embeddings           output x input_multiplier
    LM head              input x output_multiplier / m_d
    attention            Q K^T x sqrt(d_base) / d instead of / sqrt(d), d the width of a head
    the rest             as it is

At the base width and density this is the standard parametrization, to the last digit. `density`
takes the factors of m_rho alone: those of the width are 1.

Weight decay is the same number for every weight, so that what it takes off in a step goes with the
weight's learning rate, AdamW's usual coupling. Pure Python beside the folding of a model's
multipliers into its weights.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_spdf.architecture.base import Weight
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import any_layer


class Peak(NamedTuple):
    """Peak learning rate of a parameter: that of its group x a factor of the parametrization."""

    group: float
    factor: float = 1.0

    def limits(self, min_ratio: float) -> dict[str, float]:
        """Peak and final learning rate, as the groups of an optimizer name them."""
        return {"max_lr": self.group * self.factor,
                "min_lr": self.group * min_ratio * self.factor}


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
        if self.recipe.parametrization == "standard" or not weight.linear:
            return 1.0
        base, planned = self.recipe.mup_base.density, self.plan.weights.get(weight.name)
        density = _density(planned)
        if planned is not None and base < 1.0:  # as the pattern has it
            base = 1.0 - planned.pattern.rounded(planned.slice_shape, 1.0 - base)
        if math.isclose(density, base, rel_tol=1e-12):  # 1 - 0.9 is not 0.1 in every digit
            return self._width
        return self._width * density / base

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
        """Over the recipe's for the weight's group."""
        if self.recipe.parametrization == "standard":
            return 1.0
        return self.recipe.optimizer.mup_rate(weight.linear, self._width, self._growth(weight))

    def peak(self, weight: Weight) -> Peak:
        return Peak(self.recipe.optimizer.peak(weight.group), self.learning_rate(weight))

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
        base = self.recipe.mup_base.head_width if self._maximal else None
        return math.sqrt((base or head) / head) / math.sqrt(head)

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
        base = self.recipe.mup_base.head_width or model.head_width
        queries = math.sqrt(base / model.head_width)
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
    """Density of a weight as planned."""
    return 1.0 if planned is None else planned.density


def render_parametrization(recipe: Recipe, plan: Plan, weights: list[Weight]) -> str:
    """Initial spreads and peak learning rates as a table, layers of one kind and density in one
    row; nothing where one spread and one rate are those of all weights."""
    o, model = recipe.optimizer, recipe.model
    if recipe.parametrization == "standard" and {o.embedding_lr, o.norm_lr,
                                                 model.embedding_std} == {None}:
        return ""
    columns = [Column("weight"), Column("count", form="d"), Column("density", form=".4f"),
               Column("initial std", "initial_std", ".4g"),
               Column("learning rate x", "learning_rate_factor", ".4g"),
               Column("peak learning rate", "peak_learning_rate", ".4g")]
    rows = Table(columns, group_rows(recipe, plan, weights)).text("  ")
    return f"{_said(Parametrization(recipe, plan))}\n{rows}"


def group_rows(recipe: Recipe, plan: Plan, weights: list[Weight]) -> list[dict[str, Any]]:
    """The rows of that table as plain values: kind of weight, their count, density of linear ones,
    initial std, factor of the group's learning rate and its peak."""
    rules = Parametrization(recipe, plan)
    counts = Counter(_row(weight, rules) for weight in weights)
    keys = ("weight", "count", "density", "initial_std", "learning_rate_factor",
            "peak_learning_rate")
    return [dict(zip(keys, (kind, count, *values), strict=True))
            for (kind, *values), count in counts.items()]


def _row(weight: Weight, rules: Parametrization) -> tuple[str, float | None, float | None, float,
                                                          float]:
    """Kind of a weight, density of a linear one, initial std, factor and peak of its rate."""
    kind = "norms and biases" if weight.group == "norm" else any_layer(weight.name)
    density = _density(rules.plan.weights.get(weight.name)) if weight.linear else None
    peak = rules.peak(weight)
    return kind, density, rules.initial(weight).std, peak.factor, peak.limits(1.0)["max_lr"]


def _said(rules: Parametrization) -> str:
    """The parametrization in a line."""
    recipe, base = rules.recipe, rules.recipe.mup_base
    if recipe.parametrization == "standard":
        return "parametrization standard"
    if recipe.parametrization == "density":
        return f"parametrization density, base density {base.density:g}"
    return (f"parametrization mup, base width {base.hidden}, of a head "
            f"{base.head_width or recipe.model.head_width}, base density {base.density:g}: "
            f"embeddings x {rules.embedding_output:g}, LM head's input x {rules.head_input:g}, Q "
            f"K^T x {rules.attention_scale:g}")
