"""Bytes that weights, gradients and optimizer state take on a rank, by closed form.

Activations and the engines' padding (under 1%) are not in it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from megatron_spdf.config.recipe import Recipe
from megatron_spdf.model.weights import EMBEDDING, Weight, model_weights
from megatron_spdf.sparsity.plan import Plan


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank.

    Attributes:
        parameters: compact values of sparse weights and all other parameters, in the training precision; a 1/data
            share with zero_stage 3.
        gradients: fp32 buffer that micro-batches add into; a 1/data share from zero_stage 2.
        optimizer: fp32 moments, and master weights under bf16; a 1/data share from zero_stage 1, nothing if offloaded.
        expanded: dense copies of the sparse weights, kept for the step.
        masks: one bit a weight, and the positions of the active entries (8 bytes each on CPU, 4 on a GPU).
    """

    parameters: int
    gradients: int
    optimizer: int
    expanded: int
    masks: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def stage_of(layer: int, recipe: Recipe) -> int:
    """Pipeline rank that holds a block; -1 is what comes before the blocks, `layers` what comes after."""
    p = recipe.parallel
    if layer < 0:
        return 0
    if layer >= recipe.model.layers:
        return p.pipeline - 1
    return layer // (recipe.model.layers // (p.pipeline * p.interleave)) % p.pipeline


def rank_weights(recipe: Recipe, stage: int) -> list[Weight]:
    """Parameters on a pipeline rank; the last one holds the tied embedding a second time."""
    weights = model_weights(recipe.model)
    mine = [w for w in weights if stage_of(w.layer, recipe) == stage]
    if recipe.parallel.pipeline > 1 and stage == recipe.parallel.pipeline - 1:
        mine += [w for w in weights if w.name == EMBEDDING]
    return mine


def rank_bytes(recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> RankBytes:
    """Bytes on each rank of a pipeline stage."""
    tp, bf16 = recipe.parallel.tensor, recipe.train.precision == "bf16"
    width = 2 if bf16 else 4
    zero, replicas = recipe.parallel.zero_stage, recipe.parallel.data
    parameters = expanded = bits = positions = 0
    for weight in rank_weights(recipe, stage):
        sparse = plan.weights.get(weight.name)
        local = (sparse.active if sparse else weight.numel) // (1 if weight.axis is None else tp)
        parameters += local
        if sparse:
            expanded += sparse.numel // tp
            bits += sparse.chunks // tp * math.ceil(math.prod(sparse.chunk_shape) / 8)
            positions += local
    return RankBytes(
        parameters=width * parameters // (replicas if zero >= 3 else 1),
        gradients=4 * parameters // (replicas if zero >= 2 else 1),
        optimizer=0 if recipe.parallel.offload else
        (12 if bf16 else 8) * parameters // (replicas if zero >= 1 else 1),
        expanded=width * expanded,
        masks=bits + positions * (4 if on_gpu else 8),
    )


def render_layout(recipe: Recipe, plan: Plan) -> str:
    """The layout and the bytes per GPU of each pipeline stage, as text."""
    p = recipe.parallel
    lines = [
        f"layout: {p.world} ranks = tensor {p.tensor}{' + sequence' if p.sequence else ''} x pipeline {p.pipeline}"
        f"{f' (interleave {p.interleave})' if p.interleave > 1 else ''} x data {p.data}, "
        f"{recipe.engine} ZeRO-{p.zero_stage}{' offloaded' if p.offload else ''}; "
        f"{recipe.micro_batches} micro-batches of {recipe.train.micro_batch} x {recipe.train.sequence_length} tokens",
        f"steps: {recipe.steps:,} of {recipe.tokens_per_step:,} tokens",
        f"  {'GiB per GPU':<16}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'expanded':>12}{'masks':>12}"
        f"{'total':>12}   (without activations)",
    ]
    for stage in range(p.pipeline):
        b = rank_bytes(recipe, plan, stage, on_gpu=True)
        cells = "".join(f"{n / 2**30:>12.3f}" for n in (*asdict(b).values(), b.total))
        lines.append(f"  {f'stage {stage}':<16}{cells}")
    return "\n".join(lines)
