"""Cost of moving masks: bytes held and sent in a move, FLOPs over the run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_spdf.optimizers.base import STATE_BYTES
from megatron_spdf.optimizers.newborn import COLD
from megatron_spdf.planning.buffers import local_parameters
from megatron_spdf.recipe.recipe import AUTO, ENGINES, Recipe
from megatron_spdf.schedule.flops import recipe_flops
from megatron_spdf.sparsity.algorithms.base import Births, MoveCost
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.text import counted


@dataclass(frozen=True)
class Moves:
    """Moves of the masks in a run or stage, on a rank of a pipeline stage.

    Attributes:
        count: in the run.
        carried: bytes of master weights and optimizer state that a data-parallel rank gathers to
            carry them in a move; 0 where each has all of it.
        reduced: bytes that the algorithm has data-parallel ranks sum up in a move.
        transient: bytes that the algorithm holds from the beginning of the step until the move.
        flops: over those of the run's training.
    """

    count: int
    carried: int
    reduced: int
    transient: int
    flops: float


def moves_of(recipe: Recipe, plan: Plan, stage: int, on_gpu: bool = True) -> Moves:
    """Counts the moves of a run and what they cost.

    Args:
        recipe: of the run, or of a stage as a single run.
        stage: pipeline stage of the rank.
    """
    algorithm, costs = recipe.sparsity.update, _costs(recipe, plan, stage)
    count = algorithm.moves(recipe.steps)
    trained = recipe_flops(recipe, plan).total * recipe.steps
    flops = sum(algorithm.cost(w.numel, w.active, **_step(recipe)).flops
                for w in plan.weights.values())
    return Moves(
        count=count,
        carried=0 if algorithm.keeps else ENGINES.get(recipe.engine).move_bytes(
            recipe, plan, stage, on_gpu),
        reduced=sum(c.reduced for c in costs) * (recipe.parallel.data > 1),
        transient=sum(c.transient for c in costs),
        flops=count * flops / trained)


def transient_bytes(recipe: Recipe, plan: Plan, stage: int) -> int:
    """Bytes that a rank holds in a step after which masks move, beside those of other steps."""
    return (sum(cost.transient for cost in _costs(recipe, plan, stage))
            + _made_beside(recipe, plan, stage))


def _made_beside(recipe: Recipe, plan: Plan, stage: int) -> int:
    """Bytes of the largest dense gradient on a GPU that its layer does not form in other steps, on
    its way to the sum."""
    algorithm = recipe.sparsity.update
    if algorithm.needs != "dense_gradient" or algorithm.collects != "step":
        return 0
    chunks = local_parameters(recipe.model, recipe.parallel, plan, stage)
    return _step(recipe)["width"] * max((q.expands_to for chunk in chunks for q in chunk
                                         if q.expands_to and plan.skips_zeros(q.name)), default=0)


def gathered_state(recipe: Recipe, elements: int) -> int:
    """Bytes of master weights and named state that a rank gathers in a move, the master twice: to
    choose by and to carry.

    Args:
        elements: of the parameters that are gathered.
    """
    if recipe.parallel.data == 1 or recipe.parallel.zero_stage == 0:
        return 0  # every replica has all of it
    return STATE_BYTES * (len(recipe.saved) + 1) * elements


def _costs(recipe: Recipe, plan: Plan, stage: int) -> list[MoveCost]:
    """Costs of every sparse weight on a rank."""
    chunks = local_parameters(recipe.model, recipe.parallel, plan, stage)
    return [recipe.sparsity.update.cost(q.expands_to, q.elements, **_step(recipe))
            for chunk in chunks for q in chunk if q.expands_to]


def _step(recipe: Recipe) -> dict[str, int]:
    """What the cost of a move depends on, beside the weight."""
    settled = recipe.train.micro_batch != AUTO
    return {"width": 2 if recipe.train.precision == "bf16" else 4,
            "micro_batches": recipe.micro_batches if settled else 1}


def render_moves(recipe: Recipe, plan: Plan) -> str:
    """The algorithm of a run and its cost as text; nothing where masks stay."""
    algorithm = recipe.sparsity.update
    if algorithm.stays:
        return ""
    said = f"mask algorithm {algorithm.name}: {algorithm.describe()}"
    if not (count := algorithm.moves(recipe.steps)):
        return said + _cold_start(recipe)
    said += (f"; chosen {counted(count, 'time')}" if algorithm.keeps else
             f"; {counted(count, 'move')}") + f" in {counted(recipe.steps, 'step')}"
    if algorithm.holds or algorithm.keeps:
        return said
    every = [moves_of(recipe, plan, stage) for stage in range(recipe.parallel.pipeline)]
    carried, reduced, transient = (max(getattr(m, key) for m in every) / 2**20
                                   for key in ("carried", "reduced", "transient"))
    return (f"{said}\n"
            f"  in a move, per GPU: {carried:,.1f} MiB of state gathered, {reduced:,.1f} MiB "
            f"summed up, {transient:,.1f} MiB held for the step; over the run {every[0].flops:.3%} "
            f"more FLOPs{_cold_start(recipe)}")


def _cold_start(recipe: Recipe) -> str:
    """A line about what is born: what corrects its state, or how far from the usual its first
    updates are."""
    largest, newborn = recipe.optimizer.largest_first_updates, recipe.newborn
    if newborn:
        return ("\n  what is born has "
                + ("a step count of its own for Adam's bias correction" if newborn.rule == "ages"
                   else f"updates that grow over {newborn.ramp:,} steps")
                + f": an age for every value, {STATE_BYTES} bytes")
    if largest < COLD or not isinstance(recipe.sparsity.update, Births):
        return ""
    return (f"\n  warning: first updates of weights that are born are up to {largest:.1f} times "
            f"the usual: optimizer.name={recipe.optimizer.name} corrects their moments by the "
            "run's step count; set sparsity.update.newborn=ages, or lower optimizer.beta2, which "
            "is 0.95 for most language models")
