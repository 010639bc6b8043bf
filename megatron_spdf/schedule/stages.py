"""The phases of a run: its steps, sparsity plan, schedule and FLOPs, one stretch after the other.

Variable sparse pre-training (V-SPDF; Cerebras 2023, SPDF's successor at 6.7B parameters) is two of them: sparse for
most of the tokens at a high learning rate, then densified, with the learning rate warmed up again. A recipe without
`phases:` is a run of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_spdf.architecture.weights import model_weights
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import Convention, Flops, training_flops
from megatron_spdf.sparsity.plan import Plan, make_plan


@dataclass(frozen=True)
class RunPhase:
    """One phase, resolved.

    Attributes:
        number, count: which, from 1, and of how many.
        first, last: it has the steps first + 1 ... last of the run.
        recipe: the run's, with the sparsity and the schedule of this phase; its checkpoints record it.
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
    def alone(self) -> Recipe:
        """The recipe of a run of this phase alone, whose schedule begins and ends with it: what the engine sees."""
        if self.count == 1:
            return self.recipe
        train = self.recipe.train.model_copy(update={"tokens": self.tokens})
        return self.recipe.model_copy(update={"phases": [], "train": train})

    def flops(self, convention: Convention = "spdf") -> Flops:
        """Per trained token."""
        return training_flops(self.recipe.model, self.recipe.train.sequence_length, self.plan, convention)

    @property
    def heading(self) -> str:
        """The phase in a line; nothing for the only one."""
        if self.count == 1:
            return ""
        o = self.recipe.optimizer
        decay = o.decay if o.decay == "constant" else f"{o.decay} to {o.lr * o.min_lr_ratio:g}"
        return (f"phase {self.number} of {self.count}: steps {self.first + 1:,} to {self.last:,}, {self.tokens:,} "
                f"tokens, {self.flops().total * self.tokens:.4g} FLOPs; learning rate up to {o.lr:g} over "
                f"{o.warmup_tokens:,} tokens, then {decay}"
                + ("" if self.number == 1 else "; densified, with fresh optimizer moments"))


def phases_of(recipe: Recipe) -> list[RunPhase]:
    """The phases of a run, in order.

    Raises:
        ValueError: a sparsity rule that matches nothing that can be sparse.
    """
    count = max(1, len(recipe.phases))
    first, spent, phases = 0, 0.0, []
    for number, last in enumerate(recipe.borders or [recipe.steps]):
        own = recipe.in_phase(number) if recipe.phases else recipe
        plan = make_plan(own.sparsity, model_weights(own.model), own.model.query_groups)
        phases.append(RunPhase(number + 1, count, first, last, own, plan, spent))
        first, spent = last, spent + phases[-1].flops().total * phases[-1].tokens
    return phases


def phases_left(phases: Sequence[RunPhase], step: int) -> list[RunPhase]:
    """The phases that a run at this step has still to do; at the end of the run, the last one."""
    return [phase for phase in phases if phase.last > step] or [phases[-1]]


def mean_flops(phases: Sequence[RunPhase], convention: Convention = "spdf") -> Flops:
    """FLOPs per trained token over the whole run: the integral over its phases, active weights only."""
    tokens = sum(phase.tokens for phase in phases)
    linear = sum(phase.flops(convention).linear * phase.tokens for phase in phases) / tokens
    dense = phases[0].flops(convention)
    return Flops(linear, dense.attention, dense.logits)
