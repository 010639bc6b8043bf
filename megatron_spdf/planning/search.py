"""Which layouts of a recipe fit on so many GPUs, which of them is fastest, and why the others do
not do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_spdf.architecture.base import divisors
from megatron_spdf.planning.activations import peak_bytes
from megatron_spdf.planning.hardware import Gpu
from megatron_spdf.planning.parts import stored_plans
from megatron_spdf.planning.step_time import StepTime, step_time
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.sparsity.plan import Plan

USABLE = 0.92  # of a GPU's memory; the rest is for the CUDA context, NCCL, cuBLAS and fragmentation
LARGEST_MICRO_BATCH, LARGEST_INTERLEAVE = 32, 8
LARGEST_WORLD = 2**16


@dataclass(frozen=True)
class Candidate:
    """A layout of the recipe.

    Attributes:
        peak: bytes at the fullest moment on the fullest stage.
        stage: that stage.
        time: of a step; None where it does not fit.
    """

    recipe: Recipe
    peak: int
    stage: int
    time: StepTime | None = None

    @property
    def tokens_per_second(self) -> float:
        assert self.time is not None
        return self.recipe.tokens_per_step / self.time.total


@dataclass(frozen=True)
class Misfit:
    """A TP x PP x DP that cannot be used: the smallest of its variants is too large, or a rule
    forbids all."""

    recipe: Recipe
    reason: str
    excess: int | None


def laid_out(recipe: Recipe, tensor: int, pipeline: int, data: int, interleave: int = 1,
             micro_batch: int = 1, recompute: str = "none") -> Recipe:
    """The recipe at another layout; sequence parallelism wherever it can be, since it costs
    nothing."""
    # activations between layers are then split too, with the same bytes on the wire
    sequence = tensor > 1 and recipe.train.sequence_length % tensor == 0
    parallel = {"tensor": tensor, "pipeline": pipeline, "data": data, "interleave": interleave,
                "sequence": sequence}
    return recipe.model_copy(update={
        "parallel": recipe.parallel.model_copy(update=parallel),
        "train": recipe.train.model_copy(update={"micro_batch": micro_batch,
                                                 "recompute": recompute})})


def fullest(recipe: Recipe, *plans: Plan) -> Candidate:
    """The pipeline stage of a layout that needs most bytes; of equal ones the first.

    Args:
        plans: of the weights as they are stored one after another, see `parts.stored_plans`.
    """
    peaks = [max(peak_bytes(recipe, each, stage) for each in plans)
             for stage in range(recipe.parallel.pipeline)]
    stage = max(range(len(peaks)), key=lambda s: peaks[s])
    return Candidate(recipe, peaks[stage], stage)


def search(recipe: Recipe, plan: Plan, gpu: Gpu, gpus: int, efficiency: float | None = None,
           ) -> tuple[list[Candidate], list[Misfit]]:
    """All TP x PP x DP x interleaving x micro-batch x recomputation on `gpus` GPUs.

    Tensor parallelism stays inside a node; ZeRO stage and sequence length are the recipe's.

    Returns:
        Layouts that fit, fastest first, and rejected TP x PP x DP, closest first.
    """
    found, misfits, stored = [], [], stored_plans(recipe, plan)
    for tensor, pipeline, data in degrees(recipe, gpu, gpus):
        variants = list(_variants(recipe, tensor, pipeline, data))
        # the cheap question first: bytes of a layout take longer than its rules
        allowed = [v for v in variants if not any(rule_violations(v))]
        if not allowed:
            plain = laid_out(recipe, tensor, pipeline, data)
            misfits.append(Misfit(plain, next(rule_violations(plain), ""), None))
            continue
        candidates = [fullest(v, *stored) for v in allowed]
        fitting = [c for c in candidates if c.peak <= USABLE * gpu.memory]
        found += [Candidate(c.recipe, c.peak, c.stage, step_time(c.recipe, plan, gpu, efficiency))
                  for c in fitting]
        if not fitting:
            least = min(candidates, key=lambda c: c.peak)
            misfits.append(_too_large(least, gpu))
    return (sorted(found, key=lambda c: (-c.tokens_per_second, c.peak)),
            sorted(misfits, key=lambda m: (m.excess is None, m.excess or 0)))


def degrees(recipe: Recipe, gpu: Gpu, gpus: int) -> Iterator[tuple[int, int, int]]:
    """(tensor, pipeline, data) whose product is `gpus`."""
    for tensor in tensor_degrees(recipe, gpu):
        for pipeline in divisors(recipe.model.layers):
            if gpus % (tensor * pipeline) == 0:
                yield tensor, pipeline, gpus // (tensor * pipeline)


def tensor_degrees(recipe: Recipe, gpu: Gpu) -> list[int]:
    """Tensor-parallel degrees that the model allows and that fill nodes without a rest."""
    return [t for t in recipe.model.tensor_degrees() if gpu.gpus_per_node % t == 0]


def _variants(recipe: Recipe, tensor: int, pipeline: int, data: int) -> Iterator[Recipe]:
    interleaves = [v for v in divisors(recipe.model.layers // pipeline) if v <= LARGEST_INTERLEAVE]
    for interleave in interleaves if pipeline > 1 else [1]:
        for micro_batch in divisors(max(1, recipe.train.global_batch // data)):
            if micro_batch > LARGEST_MICRO_BATCH:
                break
            for recompute in ("none", "selective", "full"):
                yield laid_out(recipe, tensor, pipeline, data, interleave, micro_batch, recompute)


def _too_large(least: Candidate, gpu: Gpu) -> Misfit:
    limit = USABLE * gpu.memory
    excess = math.ceil(least.peak - limit)
    train = least.recipe.train
    reason = (f"needs {least.peak / 2**30:,.1f} GiB on stage {least.stage} (micro-batch "
              f"{train.micro_batch}, recompute {train.recompute}), {excess / 2**30:,.1f} GiB too "
              "much")
    return Misfit(least.recipe, reason, excess)


def smallest_world(recipe: Recipe, plan: Plan, gpu: Gpu) -> Candidate | None:
    """The layout with the fewest GPUs on which the recipe trains at all: one sequence at a time,
    layers recomputed.

    Returns:
        None if even LARGEST_WORLD GPUs are too few.
    """
    batch, choices, stored = recipe.train.global_batch, [], stored_plans(recipe, plan)
    for tensor in tensor_degrees(recipe, gpu):
        for pipeline in divisors(recipe.model.layers):
            choices += [(tensor * pipeline * data, pipeline, tensor, data)
                        for data in divisors(batch)
                        if tensor * pipeline * data <= LARGEST_WORLD]
    # by world size, then the fewest pipeline stages, whose bubbles cost time
    for _, pipeline, tensor, data in sorted(choices):
        candidate = laid_out(recipe, tensor, pipeline, data, recompute="full")
        if all(peak_bytes(candidate, each, stage) <= USABLE * gpu.memory
               for stage in range(pipeline) for each in stored):
            return fullest(candidate, *stored)
    return None


def holds(recipe: Recipe, plan: Plan, gpu: Gpu, gpus: int) -> bool:
    """True if some layout on `gpus` GPUs fits, layers recomputed."""
    stored = stored_plans(recipe, plan)
    least = (laid_out(recipe, *d, recompute="full") for d in degrees(recipe, gpu, gpus))
    return any(not any(rule_violations(r)) and fullest(r, *stored).peak <= USABLE * gpu.memory
               for r in least)


def usable_worlds(recipe: Recipe, gpu: Gpu, gpus: int) -> list[int]:
    """The nearest numbers of GPUs below and above `gpus` for which some layout obeys the rules."""
    def possible(world: int) -> bool:
        return any(not any(rule_violations(laid_out(recipe, *d)))
                   for d in degrees(recipe, gpu, world))

    below = next((n for n in range(gpus - 1, 0, -1) if possible(n)), None)
    above = next((n for n in range(gpus + 1, 4 * gpus + 8) if possible(n)), None)
    return [n for n in (below, above) if n is not None]
