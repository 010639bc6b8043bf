"""What is not zero stays: masks that were chosen before, by any tool, and are in the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from megatron_spdf.architecture.base import Model, Weight
from megatron_spdf.sparsity.plan import SparseWeight, make_plan
from megatron_spdf.sparsity.selectors.base import SELECTORS, Selector, TrainedWeight
from megatron_spdf.sparsity.settings import Sparsity, SparsityRule
from megatron_spdf.sparsity.slices import slice_of
from megatron_spdf.text import any_layer

# Share of zeros up to which a weight counts as dense: bf16 makes a few of the smallest values zero.
BY_CHANCE = 0.01


class Nonzero(Selector):
    """All that is not zero.

    A slice that has fewer nonzero entries than the plan says is filled up with its first zeros,
    which `algorithm: imported` holds.
    """

    name = "nonzero"
    reads_levels = True
    how = "what was not zero"

    def levels(self, sparsity: Sparsity, model: Model, read: Callable[[str], Tensor]) -> Sparsity:
        """A level for each weight, such that its fullest slice fits; masks that are equally full
        in all slices may move later, the others are `imported`."""
        if sparsity.level or sparsity.rules:
            return sparsity
        cut = make_plan(sparsity.model_copy(update={"level": 0.5}), model.weights(), model.slices)
        rules, uneven = [], False
        for name, planned in cut.weights.items():
            counts = _counts(read(name), planned)
            if sum(counts) >= (1.0 - BY_CHANCE) * planned.numel:
                continue
            uneven |= len(set(counts)) > 1
            rules.append(SparsityRule(weights=name, level=_level(max(counts), planned)))
        if not rules:
            raise ValueError(
                f"select={self.name}: no linear weight has over {BY_CHANCE:.0%} zeros, so there "
                "are no masks to read; choose some with --select magnitude, wanda or sparsegpt, or "
                "leave it out")
        if uneven and sparsity.algorithm != "static":
            raise ValueError(
                f"select={self.name}: slices of the same weight have different numbers of zeros, "
                f"and sparsity.algorithm={sparsity.algorithm} moves masks of equal ones; leave the "
                "algorithm out to keep these masks, or choose others with --select magnitude")
        return Sparsity.model_validate(sparsity.model_dump(exclude={"update"}) | {
            "rules": _merged(rules, model.weights()),
            **({"algorithm": "imported"} if uneven else
               {"update": sparsity.update.model_dump()})})

    def select(self, trained: TrainedWeight) -> tuple[Tensor, np.ndarray]:
        planned = trained.planned
        masks = np.stack([slice_of(trained.values, planned, number).numpy() != 0
                          for number in range(planned.slices)])
        wanted, counts = planned.active_per_slice, masks.sum(1)
        if counts.max() > wanted or counts.min() < wanted and not planned.algorithm.holds:
            raise ValueError(
                f"select={self.name}: slices of {planned.name} have {counts.min():,} to "
                f"{counts.max():,} nonzero entries, and the recipe keeps {wanted:,} of each; leave "
                "out sparsity.level, sparsity.rules and --sparsity, so that levels are read off "
                "the weights, or choose masks with --select magnitude")
        for mask, count in zip(masks, counts, strict=True):
            mask[np.flatnonzero(~mask)[: wanted - count]] = True
        return trained.values, masks

    def check(self, planned: SparseWeight) -> None:
        """Masks of any pattern can be read; whether they are of this one is seen as they are."""


def _counts(weight: Tensor, planned: SparseWeight) -> list[int]:
    """Nonzero entries of each slice."""
    return [int(slice_of(weight, planned, number).count_nonzero())
            for number in range(planned.slices)]


def _level(active: int, planned: SparseWeight) -> float:
    """The level at which a slice keeps so many entries, over 0 also where it keeps all."""
    entries = math.prod(planned.slice_shape)
    return max(1.0 - max(active, 1) / entries, 0.25 / entries)


def _merged(rules: list[SparsityRule], weights: Iterable[Weight]) -> list[SparsityRule]:
    """One rule for the weights of all layers where they have one level."""
    layers = len({w.layer for w in weights if w.linear})
    levels: dict[str, list[float]] = {}
    for rule in rules:
        levels.setdefault(any_layer(rule.weights), []).append(rule.level)
    alike = {name for name, found in levels.items()
             if len(found) == layers and len(set(found)) == 1}
    merged = {any_layer(rule.weights) if any_layer(rule.weights) in alike else rule.weights:
              rule.level for rule in rules}
    return [SparsityRule(weights=name, level=level) for name, level in merged.items()]


SELECTORS.register(Nonzero.name, Nonzero)
