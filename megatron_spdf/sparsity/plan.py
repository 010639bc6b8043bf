"""The plan: which weight is how sparse, decided once from the recipe and the same on every rank."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from megatron_spdf.architecture.base import Model, Weight
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, MaskAlgorithm
from megatron_spdf.sparsity.algorithms.static import Static
from megatron_spdf.sparsity.distribution import erk_densities, whole_entries
from megatron_spdf.sparsity.patterns.base import Pattern, Shape
from megatron_spdf.sparsity.patterns.unstructured import Unstructured
from megatron_spdf.sparsity.settings import Sparsity
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import any_layer


@dataclass(frozen=True)
class SparseWeight:
    """A weight cut along its tensor-parallel axis into equal slices with the same number of active
    entries.

    Attributes:
        name: canonical name; with the seed and the slice number it determines the mask.
        shape: (out, in) of the whole weight.
        axis: the axis that tensor parallelism, and so the slices, cut.
        slices: number of slices C; every tensor-parallel degree that divides C keeps the slices
            whole.
        level: the sparsity asked for.
        pattern: of the masks.
        reached: share of the level that the weight is stored at while an algorithm prunes it.
        algorithm: that changes the mask.
    """

    name: str
    shape: Shape
    axis: int
    slices: int
    level: float
    pattern: Pattern = Unstructured()
    reached: float = 1.0
    algorithm: MaskAlgorithm = Static()

    @property
    def stored(self) -> float:
        """The sparsity that the weight is stored at, asked for."""
        return self.level * self.reached

    @property
    def slice_shape(self) -> Shape:
        out, inputs = self.shape
        return (out // self.slices, inputs) if self.axis == 0 else (out, inputs // self.slices)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def active_per_slice(self) -> int:
        """Exact number of active entries k of each slice."""
        return self.active_at(self.reached)

    def active_at(self, share: float) -> int:
        """Exact number of active entries of each slice at a share of the level."""
        return self.pattern.active(self.slice_shape, self.level * share)

    @property
    def stored_per_slice(self) -> int:
        """Number of entries of each slice that the parameter stores."""
        return math.prod(self.slice_shape) if self.algorithm.keeps else self.active_per_slice

    @property
    def trained_per_slice(self) -> int:
        """Number of entries of each slice that get a gradient."""
        return self.algorithm.trained(math.prod(self.slice_shape), self.active_per_slice)

    @property
    def trains_some(self) -> bool:
        """True if the parameter stores entries that get no gradient."""
        return self.trained_per_slice < self.stored_per_slice

    @property
    def active(self) -> int:
        return self.slices * self.active_per_slice

    @property
    def skips_zeros(self) -> bool:
        """True if a GPU multiplies with the active entries alone, forward and backward."""
        return self.pattern.skips_zeros and not self.algorithm.keeps

    @property
    def sparsity(self) -> float:
        """The sparsity that whole numbers and the pattern allow, which the measured one must
        equal."""
        return 1.0 - self.active / self.numel

    @property
    def density(self) -> float:
        """The density that initial values and learning rates go by."""
        return 1.0 - self.pattern.rounded(self.slice_shape, self.stored)

    def draw(self, seed: int, slice_id: int) -> np.ndarray:
        """Draws the mask of one slice: (entries,) bool, in row-major order."""
        mask = self.pattern.draw(seed, self.name, slice_id, self.slice_shape, self.stored)
        return mask.reshape(-1)

    def fault(self, masks: np.ndarray) -> str | None:
        """Returns what the pattern misses in masks of slices, (slices, entries) bool, in words.

        None: they are as they should be.
        """
        masks = masks.reshape(-1, *self.slice_shape)
        return self.pattern.fault(masks, self.slice_shape, self.stored)

    def largest(self, entries: np.ndarray) -> np.ndarray:
        """Returns the mask of the largest magnitudes of a slice, (entries,) bool.

        Args:
            entries: (entries,) of the slice in row-major order, floating point.
        """
        return self.pattern.largest(entries.reshape(self.slice_shape), self.stored).reshape(-1)


class SparseModel(Protocol):
    """A recipe, as far as its plan depends on it."""

    @property
    def sparsity(self) -> Sparsity: ...

    @property
    def model(self) -> Model: ...


# a key by identity: the planner asks about one plan at thousands of layouts
@dataclass(frozen=True, eq=False)
class Plan:
    """Canonical name -> sparse weight, for the weights that are sparse; `seed` is of the masks,
    `dense_copy` the recipe's `sparsity.dense_copy`."""

    seed: int
    weights: dict[str, SparseWeight]
    dense_copy: str = "per_step"

    @classmethod
    def of(cls, recipe: SparseModel) -> Plan:
        """Decides how sparse each weight of the recipe's model is.

        Raises:
            ValueError: see `make_plan`.
        """
        model = recipe.model
        return make_plan(recipe.sparsity, model.weights(), model.slices)

    @cached_property
    def skipped(self) -> Plan:
        """The weights whose zeros a GPU skips; what it executes counts their active entries
        only."""
        return Plan(self.seed, {n: w for n, w in self.weights.items() if w.skips_zeros},
                    self.dense_copy)

    def skips_zeros(self, name: str) -> bool:
        """True if a GPU multiplies with this weight's active entries alone."""
        return self.weights[name].skips_zeros

    def keeps_copy(self, name: str, on_gpu: bool) -> bool:
        """True if a dense copy of this weight is kept for the step."""
        return self.dense_copy == "per_step" and not (on_gpu and self.skips_zeros(name))

    @property
    def numel(self) -> int:
        return sum(w.numel for w in self.weights.values())

    @property
    def active(self) -> int:
        return sum(w.active for w in self.weights.values())

    @property
    def trained(self) -> int:
        """Entries that get a gradient."""
        return sum(w.slices * w.trained_per_slice for w in self.weights.values())

    @property
    def sparsity(self) -> float:
        """Sparsity of the sparse weights together; 0.0 where there is none."""
        return 1.0 - self.active / self.numel if self.weights else 0.0


def make_plan(sparsity: Sparsity, weights: list[Weight], slices: int) -> Plan:
    """Gives every linear weight the level of the first rule that matches it, else what
    `distribution` makes of the default level.

    Args:
        weights: all parameters of the model; only those marked `linear` can be sparse.
        slices: C, the number of query groups: the largest tensor-parallel degree the model allows.
            An axis that this does not divide, or the pattern, may leave a weight fewer.

    Raises:
        ValueError: a rule that matches nothing that can be sparse, or a weight that cannot have the
            pattern.
    """
    candidates = [w for w in weights if w.linear]
    levels, used = _levels(sparsity, candidates, slices)
    pattern, plan = sparsity.masks, {}
    for weight, level in zip(candidates, levels, strict=True):
        if level * sparsity.reached > 0.0:
            place = weight.name, weight.shape, weight.axis
            cut = pattern.cut(*place, _most_slices(weight, slices), level)
            plan[weight.name] = SparseWeight(*place, cut, level, pattern, sparsity.reached,
                                             sparsity.update)
    _refuse_idle_rules(sparsity, used, candidates, weights)
    return Plan(sparsity.seed, plan, sparsity.dense_copy)


def _most_slices(weight: Weight, slices: int) -> int:
    return math.gcd(slices, weight.shape[weight.axis])


def _levels(sparsity: Sparsity, weights: list[Weight],
            slices: int) -> tuple[list[float], set[int]]:
    """Level of each weight, and the rules that matched."""
    levels, used, free = [sparsity.level] * len(weights), set(), []
    for i, weight in enumerate(weights):
        matching = (number for number, rule in enumerate(sparsity.rules)
                    if fnmatch.fnmatchcase(weight.name, rule.weights))
        if (number := next(matching, None)) is None:
            free.append(i)
        else:
            levels[i] = sparsity.rules[number].level
            used.add(number)
    if sparsity.distribution == "erk" and sparsity.level and free:
        cut = [_most_slices(weights[i], slices) for i in free]
        by_erk = _erk_levels([weights[i] for i in free], sparsity.level, cut)
        for i, level in zip(free, by_erk, strict=True):
            levels[i] = level
    return levels, used


def _erk_levels(weights: list[Weight], level: float, slices: list[int]) -> list[float]:
    entries = [w.numel // c for w, c in zip(weights, slices, strict=True)]
    budget = sum(Unstructured().active((1, n), level) * c
                 for n, c in zip(entries, slices, strict=True))
    active = whole_entries(erk_densities(weights, 1.0 - level), entries, slices, budget)
    return [1.0 - k / n for k, n in zip(active, entries, strict=True)]


def check_tensor(plan: Plan, tensor: int) -> None:
    """Requires that every tensor-parallel rank holds whole slices.

    Raises:
        ValueError: the pattern leaves a weight too few slices for that.
    """
    for w in plan.weights.values():
        if w.slices % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide the {w.slices} slices that "
                             f"sparsity.pattern={w.pattern.name} leaves {w.name} "
                             f"({w.shape[0]} x {w.shape[1]}) at level {w.level}; tensor may be a "
                             f"divisor of {_fewest_slices(plan)}, or take {w.pattern.remedy}")


def check_algorithm(plan: Plan, sparsity: Sparsity) -> None:
    """Requires that the masks of a plan can move as the recipe says.

    Raises:
        ValueError: no weight is sparse, the pattern ties entries to each other in a way that the
            algorithm cannot follow, or a slice has too few zeros for so many to be born, or too few
            tiles for any to move.
    """
    name = sparsity.algorithm
    if name == "static":
        return
    if not plan.weights:
        raise ValueError(f"sparsity.algorithm={name} moves masks, and no weight is sparse; set "
                         "sparsity.level, or algorithm=static")
    for w in plan.weights.values():
        if sparsity.update.keeps:
            sparsity.update.check(w)
            continue
        _check_pattern(w.pattern, sparsity)
        size = math.prod(w.pattern.moving_unit)
        active, what = w.active_per_slice // size, "entries" if size == 1 else "tiles"
        zeros = math.prod(w.slice_shape) // size - active
        moved = sparsity.update.largest_move(active)
        if moved > zeros:
            raise ValueError(f"sparsity.algorithm={name} moves {moved:,} of the {active:,} active "
                             f"{what} of a slice of {w.name} at once, which has {zeros:,} zeros "
                             f"to take their place; lower sparsity.update.fraction to "
                             f"{zeros / active:.3f} or raise the level {w.level:g}")
        if size == 1 and moved == 0 and getattr(sparsity.update, "fraction", 0.0):
            raise ValueError(f"sparsity.update.fraction={sparsity.update.fraction:g} of the "
                             f"{active:,} active entries of a slice of {w.name} is none, so that "
                             f"they would never move; raise it to {1 / active:.3g} or more")
        if size > 1 and moved < 2 and getattr(sparsity.update, "fraction", 1.0):
            raise ValueError(f"sparsity.algorithm={name} moves {moved} of the {active} active "
                             f"tiles of a slice of {w.name} at once, and tiles are swapped two by "
                             f"two; raise sparsity.update.fraction to {min(1.0, 2 / active):.3g}, "
                             "or take smaller tiles")


def _check_pattern(pattern: Pattern, sparsity: Sparsity) -> None:
    """Requires that an algorithm can move the masks of a pattern.

    Raises:
        ValueError: it cannot.
    """
    if pattern.moving_unit and (sparsity.update.exchanges or not pattern.exchanges):
        return
    told = (f"sparsity.algorithm={sparsity.algorithm} lets single entries die and be born, and "
            f"sparsity.pattern={sparsity.pattern} ties them to each other; set ")
    if pattern.moving_unit:
        able = [name for name in ALGORITHMS.names() if ALGORITHMS.get(name).exchanges]
        raise ValueError(f"{told}algorithm={' or '.join(able)}, which move tiles as they are, "
                         "algorithm=static, or pattern=unstructured")
    raise ValueError(f"{told}algorithm=ste, which chooses masks anew from dense weights, "
                     "algorithm=static, or pattern=unstructured")


def _fewest_slices(plan: Plan) -> int:
    """The largest tensor-parallel degree of a plan."""
    return math.gcd(*(w.slices for w in plan.weights.values()))


def _refuse_idle_rules(sparsity: Sparsity, used: set[int], candidates: list[Weight],
                       weights: list[Weight]) -> None:
    for number, rule in enumerate(sparsity.rules):
        if number in used:
            continue
        if any(fnmatch.fnmatchcase(w.name, rule.weights) for w in candidates):
            why = ("every weight it matches is taken by an earlier rule; put it before that one or "
                   "remove it")
        elif any(fnmatch.fnmatchcase(w.name, rule.weights) for w in weights):
            why = "it matches only embeddings, norms or biases, which stay dense; remove it"
        else:
            why = ("no weight has such a name; they look like "
                   f"{', '.join(w.name for w in candidates[:4])}")
        raise ValueError(f"sparsity.rules.{number}: weights={rule.weights!r} decides nothing: "
                         f"{why}")


def render_plan(plan: Plan) -> str:
    """The plan as a table, layers of one kind and level in one row."""
    rows: dict[tuple[str, tuple[int, int], float], list[SparseWeight]] = {}
    for w in plan.weights.values():
        rows.setdefault((any_layer(w.name), w.shape, w.level), []).append(w)
    if not rows:
        return "sparsity plan: dense, every weight is active"
    columns = [Column("weight", lambda group: any_layer(group[0].name)), Column("count", len, "d"),
               Column("shape", lambda group: " x ".join(map(str, group[0].shape)), align="right"),
               Column("slices", lambda group: group[0].slices, "d"),
               Column("active/slice", lambda group: group[0].active_per_slice, ","),
               Column("sparsity", lambda group: group[0].sparsity, ".4%")]
    return (f"sparsity plan (mask seed {plan.seed}): {plan.active:,} of {plan.numel:,} linear "
            f"weights active, sparsity {plan.sparsity:.4%}{_render_pattern(plan)}\n"
            f"{Table(columns, list(rows.values())).text('  ')}")


def _render_pattern(plan: Plan) -> str:
    """What the pattern makes of the levels asked for; all weights of a plan have one."""
    (pattern,) = {w.pattern for w in plan.weights.values()}
    levels = sorted({w.level for w in plan.weights.values()})
    said = pattern.describe(levels, _fewest_slices(plan))
    return f"; {said}" if said else ""
