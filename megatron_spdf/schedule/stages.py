"""Stages of a run, each with its steps, sparsity plan, schedule and FLOPs.

Variable sparse pre-training (V-SPDF; Cerebras 2023, SPDF's successor at 6.7B parameters) has two:
sparse for most of the tokens at a high learning rate, then densified, with another warm-up of the
learning rate. A recipe without `stages:` makes a run of one stage.

An algorithm that prunes divides a stage of the recipe further, into parts that store sparse weights
at one density each. The learning rate, the optimizer's state and its count go on from part to part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import Convention, Flops, recipe_flops
from megatron_spdf.sparsity.algorithms.base import Part
from megatron_spdf.sparsity.plan import Plan


@dataclass(frozen=True)
class RunStage:
    """Stage of a run, or part of one.

    Attributes:
        number, count: of this stage, from 1, and of all stages.
        first, last: its steps are first + 1 ... last of the run.
        begin, end: steps after which its schedule begins and ends.
        recipe: of the run, with the sparsity and schedule of this stage, as checkpoints record it.
        plan: its sparsity plan.
        mean_plan: at the mean density over its steps, which FLOPs go by.
        flops_before: FLOPs of training up to step `first`.
    """

    number: int
    count: int
    first: int
    last: int
    begin: int
    end: int
    recipe: Recipe
    plan: Plan
    mean_plan: Plan
    flops_before: float = 0.0

    @property
    def tokens(self) -> int:
        return (self.last - self.first) * self.recipe.tokens_per_step

    @property
    def steps(self) -> int:
        """Steps of its schedule."""
        return self.end - self.begin

    @property
    def continues(self) -> bool:
        """True if the schedule began in the stage before."""
        return self.first > self.begin

    @property
    def as_single_run(self) -> Recipe:
        """Recipe of a run of this schedule only. Engines get this one."""
        if self.steps == self.recipe.steps:
            return self.recipe
        train = self.recipe.train.model_copy(
            update={"tokens": self.steps * self.recipe.tokens_per_step})
        return self.recipe.model_copy(update={"stages": [], "train": train})

    def flops(self, convention: Convention = "spdf") -> Flops:
        """FLOPs per trained token."""
        return recipe_flops(self.recipe, self.mean_plan, convention)

    @property
    def heading(self) -> str:
        """Line about the stage, empty for the only one of a run."""
        if self.count == 1:
            return ""
        if self.recipe.sparsity.algorithm != "static" and self.steps != self.last - self.first:
            return self._heading_of_part
        o = self.recipe.optimizer
        decay = o.decay if o.decay == "constant" else f"{o.decay} to {o.lr * o.min_lr_ratio:g}"
        if o.decay_share < 1.0:
            decay = f"constant, over the last {o.decay_share:.0%} {decay}"
        return (f"stage {self.number} of {self.count}: steps {self.first + 1:,} to {self.last:,}, "
                f"{self.tokens:,} tokens, {self.flops().total * self.tokens:.4g} FLOPs; learning "
                f"rate up to {o.lr:g} over {o.warmup_tokens:,} tokens, then {decay}"
                + ("" if self.number == 1 else f"; {self._border}, with fresh optimizer moments"))

    @property
    def _heading_of_part(self) -> str:
        return (f"stage {self.number} of {self.count}: steps {self.first + 1:,} to {self.last:,}, "
                f"{self.tokens:,} tokens; {self._stored}")

    @property
    def _border(self) -> str:
        return "pruned by magnitude" if self.plan.weights else "densified"

    @property
    def _stored(self) -> str:
        return (f"weights stored at {self.plan.sparsity:.2%} sparsity" if self.plan.weights
                else "weights stored dense")


def stages_of(recipe: Recipe) -> list[RunStage]:
    """Stages of a run, in order.

    Raises:
        ValueError: a sparsity rule that matches nothing that can be sparse.
    """
    ends = recipe.stage_ends or [recipe.steps]
    cut: list[tuple[int, int, Part, Recipe]] = []
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own = recipe.in_stage(number) if recipe.stages else recipe
        cut += [(begin, end, part, own) for part in own.sparsity.update.parts(end - begin)]
    first, spent, stages = 0, 0.0, []
    for number, (begin, end, part, own) in enumerate(cut, 1):
        last, own = begin + part.last, own.stored_at(part.reached)
        plan = Plan.of(own)
        mean = _mean_plan(own, first - begin, part.last, end - begin) or plan
        stages.append(RunStage(number, len(cut), first, last, begin, end, own, plan, mean, spent))
        first, spent = last, spent + stages[-1].flops().total * stages[-1].tokens
    return stages


def _mean_plan(recipe: Recipe, first: int, last: int, steps: int) -> Plan | None:
    """The plan at the mean density over steps first + 1 ... last of a stage; None: it stays."""
    algorithm = recipe.sparsity.update
    if not algorithm.holds:
        return None
    shares = [algorithm.share(step, steps) for step in range(first + 1, last + 1)]
    return Plan.of(recipe.stored_at(sum(shares) / len(shares)))


def stages_left(stages: Sequence[RunStage], step: int) -> list[RunStage]:
    """Stages that are not finished at this step, or at the end of the run the last one."""
    return [stage for stage in stages if stage.last > step] or [stages[-1]]


def mean_flops(stages: Sequence[RunStage], convention: Convention = "spdf") -> Flops:
    """Mean FLOPs per trained token over the stages of a run, active weights only."""
    tokens = sum(stage.tokens for stage in stages)
    linear = sum(stage.flops(convention).linear * stage.tokens for stage in stages) / tokens
    dense = stages[0].flops(convention)
    return Flops(linear, dense.attention, dense.logits)
