"""FLOPs of training, for planner, log and reports.

A multiply-add is two FLOPs, the backward pass costs twice the forward pass, only active weights
count; norms, biases and embedding look-ups are free. Two conventions differ in attention:

- `spdf` does not halve it for causality. It reproduces SPDF's supplement, Table 2 (Thangarasa et
  al. 2023), within 1%:

      per sequence = 72 L d^2 T (1 - s) + 12 L T^2 d + 6 V d T

  L layers, d hidden, T tokens of a sequence, s sparsity, V rows of the vocabulary.
- `causal` counts the keys that a query attends to, (T + 1) / 2 on average, as a causal kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_spdf.architecture.base import Model
from megatron_spdf.recipe.distillation import teacher_of
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan

Convention = Literal["spdf", "causal"]
Recompute = Literal["none", "selective", "full"]
FORWARD_AND_BACKWARD = 3  # in units of the forward pass


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, by part: linear weights, QK^T and PV, LM head."""

    linear: float
    attention: float
    logits: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.logits

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention,
                     self.logits + other.logits)


def forward_flops(
    model: Model, sequence_length: int, plan: Plan | None = None, convention: Convention = "spdf"
) -> Flops:
    """FLOPs per token of a forward pass, in training or inference.

    Args:
        sequence_length: T, tokens.
        plan: counts active weights only; None counts all weights, as a GPU executes them after
            unstructured ones are expanded.
        convention: see above.
    """
    keys = sequence_length if convention == "spdf" else (sequence_length + 1) / 2
    linear, attention, logits = model.forward_flops(keys)
    if plan is not None:
        linear += 2.0 * (plan.active - plan.numel)
    return Flops(linear, attention, logits)


def training_flops(
    model: Model,
    sequence_length: int,
    plan: Plan | None = None,
    convention: Convention = "spdf",
    recompute: Recompute = "none",
) -> Flops:
    """FLOPs per trained token, forward and backward.

    Args:
        model, sequence_length, plan, convention: see `forward_flops`.
        recompute: adds the repeated forward passes of the attention core (selective) or of whole
            layers (full): "hardware FLOPs" of Korthikanti et al. 2022, section 6. The log and the
            paper's tables count none.
    """
    once = forward_flops(model, sequence_length, plan, convention)
    # the weights' gradient, of entries that are masked
    masked = 2.0 * (plan.trained - plan.active) if plan else 0.0
    return Flops(
        linear=once.linear * (FORWARD_AND_BACKWARD + (recompute == "full")) + masked,
        attention=once.attention * (FORWARD_AND_BACKWARD + (recompute != "none")),
        logits=once.logits * FORWARD_AND_BACKWARD,
    )


def recipe_flops(recipe: Recipe, plan: Plan | None = None, convention: Convention = "spdf",
                 recompute: Recompute = "none", length: float | None = None) -> Flops:
    """FLOPs per trained token of a recipe's run: `training_flops`, and the forward pass of a
    teacher.

    Args:
        length: tokens of a sequence; None: the recipe's.
    """
    length = length or recipe.train.sequence_length
    own = training_flops(recipe.model, length, plan, convention, recompute)
    teacher = teacher_of(recipe)
    return own + forward_flops(teacher, length, None, convention) if teacher else own


@dataclass(frozen=True)
class Ramp:
    """Part of a sparsity schedule: s(t) = end + (start - end) (1 - t)^power, t from 0 to 1.

    Attributes:
        share: tokens of the part, in any unit.
        start, end: sparsity at its start and end.
    """

    share: float
    start: float
    end: float
    power: float = 1.0

    @property
    def average(self) -> float:
        """Mean of s(t)."""
        return self.end + (self.start - self.end) / (self.power + 1.0)


def gradual_pruning(level: float) -> list[Ramp]:
    """Schedule of gradual magnitude pruning (Frantar et al. 2023): dense for a quarter, cubic to
    `level` for a half, sparse for a quarter."""
    return [Ramp(0.25, 0.0, 0.0), Ramp(0.5, 0.0, level, power=3.0), Ramp(0.25, level, level)]


def average_sparsity(ramps: Sequence[Ramp]) -> float:
    """Mean sparsity over the tokens of a schedule. FLOPs of linear weights are linear in it.

    Raises:
        ValueError: there is no ramp, or a share is not positive.
    """
    if not ramps or any(p.share <= 0.0 for p in ramps):
        raise ValueError("a schedule needs ramps of positive share, not "
                         f"{[p.share for p in ramps]}")
    return sum(p.share * p.average for p in ramps) / sum(p.share for p in ramps)


def schedule_flops(
    model: Model,
    sequence_length: int,
    ramps: Sequence[Ramp],
    convention: Convention = "spdf",
    dense_gradient_every: int | None = None,
) -> Flops:
    """Mean FLOPs per trained token of a run whose uniform sparsity changes in time.

    Args:
        model, sequence_length, convention: see `forward_flops`.
        ramps: the schedule.
        dense_gradient_every: steps dT between two that compute the gradient of all weights, to
            choose which to grow: (3 f_S dT + 2 f_S + f_D) / (dT + 1) in RigL (Evci et al. 2020,
            appendix H), f_S and f_D being sparse and dense forward passes.
    """
    dense = training_flops(model, sequence_length, None, convention)
    linear = dense.linear * (1.0 - average_sparsity(ramps))
    if dense_gradient_every is not None:
        update = (2.0 * linear + dense.linear) / FORWARD_AND_BACKWARD
        linear = (linear * dense_gradient_every + update) / (dense_gradient_every + 1.0)
    return Flops(linear, dense.attention, dense.logits)
