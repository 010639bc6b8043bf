"""The stages of a run: its steps, sparsity plan, schedule and FLOPs, one stretch after the other.

Variable sparse pre-training (V-SPDF; Cerebras 2023, SPDF's successor at 6.7B parameters) is two of
them: sparse for most of the tokens at a high learning rate, then densified, with the learning rate
warmed up again. A recipe without `stages:` is a run of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import Convention, Flops, training_flops
from megatron_spdf.sparsity.plan import Plan


@dataclass(frozen=True)
class RunStage:
    """One stage, resolved.

    Attributes:
        number, count: which, from 1, and of how many.
        first, last: it has the steps first + 1 ... last of the run.
        recipe: the run's, with the sparsity and the schedule of this stage; its checkpoints record
            it.
        plan: what is sparse.
        flops_before: of training up to step `first`.
    """

    number: int
    count: int
    first: int
    last: int
    recipe: Recipe
    plan: Plan
    flops_before: float = 0.0

    @property
    def tokens(self) -> int:
        return (self.last - self.first) * self.recipe.tokens_per_step

    @property
    def as_single_run(self) -> Recipe:
        """The recipe of a run of this stage alone, whose schedule begins and ends with it: what the
        engine sees."""
        if self.count == 1:
            return self.recipe
        train = self.recipe.train.model_copy(update={"tokens": self.tokens})
        return self.recipe.model_copy(update={"stages": [], "train": train})

    def flops(self, convention: Convention = "spdf") -> Flops:
        """Per trained token."""
        return training_flops(self.recipe.model, self.recipe.train.sequence_length, self.plan,
                              convention)

    @property
    def heading(self) -> str:
        """The stage in a line; nothing for the only one."""
        if self.count == 1:
            return ""
        o = self.recipe.optimizer
        decay = o.decay if o.decay == "constant" else f"{o.decay} to {o.lr * o.min_lr_ratio:g}"
        return (f"stage {self.number} of {self.count}: steps {self.first + 1:,} to {self.last:,}, "
                f"{self.tokens:,} tokens, {self.flops().total * self.tokens:.4g} FLOPs; learning "
                f"rate up to {o.lr:g} over {o.warmup_tokens:,} tokens, then {decay}"
                + ("" if self.number == 1 else "; densified, with fresh optimizer moments"))


def stages_of(recipe: Recipe) -> list[RunStage]:
    """The stages of a run, in order.

    Raises:
        ValueError: a sparsity rule that matches nothing that can be sparse.
    """
    count = max(1, len(recipe.stages))
    first, spent, stages = 0, 0.0, []
    for number, last in enumerate(recipe.stage_ends or [recipe.steps]):
        own = recipe.in_stage(number) if recipe.stages else recipe
        plan = Plan.of(own)
        stages.append(RunStage(number + 1, count, first, last, own, plan, spent))
        first, spent = last, spent + stages[-1].flops().total * stages[-1].tokens
    return stages


def stages_left(stages: Sequence[RunStage], step: int) -> list[RunStage]:
    """The stages that a run at this step has still to do; at the end of the run, the last one."""
    return [stage for stage in stages if stage.last > step] or [stages[-1]]


def mean_flops(stages: Sequence[RunStage], convention: Convention = "spdf") -> Flops:
    """FLOPs per trained token over the whole run: the integral over its stages, active weights
    only."""
    tokens = sum(stage.tokens for stage in stages)
    linear = sum(stage.flops(convention).linear * stage.tokens for stage in stages) / tokens
    dense = stages[0].flops(convention)
    return Flops(linear, dense.attention, dense.logits)
