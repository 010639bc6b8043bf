"""Bytes that weights, gradients and optimizer state take on a rank, by closed form, padding
included.

What is kept between steps; what a step needs beside it is in `activations.py`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from megatron_spdf.architecture.base import Model
from megatron_spdf.planning.buffers import local_parameters
from megatron_spdf.recipe.distillation import teacher_of
from megatron_spdf.recipe.recipe import AUTO, ENGINES, Parallel, Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import GIB, Column, Table
from megatron_spdf.text import counted

SPAN = 1024  # of `kernels.mask`, which needs PyTorch
GATHERED_LAYERS = 2  # ZeRO-3: the layer that runs, and the one fetched behind it


@dataclass(frozen=True)
class RankBytes:
    """Bytes on one rank.

    Attributes:
        parameters: compact values of sparse weights and all other parameters, in the training
            precision.
        gradients: fp32 buffer that micro-batches add into.
        master: fp32 weights of the optimizer, under bf16.
        moments: named state of the optimizer, fp32.
        expanded: dense copies of the sparse weights that are kept for the step.
        masks: one bit a weight, where some are held one for each that is stored, of masks that move
            another for the first mask and a byte for each age that is asked for, and what kernels
            derive from them: on CPU the positions of the active entries, 8 bytes each; on a GPU 4
            bytes for `SPAN` entries of a slice, and what the pattern's product needs.
        gathered: ZeRO-3 only, whole parameters of the layers at work.
        teacher: weights of the model that is distilled from, dense, whatever ZeRO shards.
    """

    parameters: int
    gradients: int
    master: int
    moments: int
    expanded: int
    masks: int
    gathered: int = 0
    teacher: int = 0

    @property
    def optimizer(self) -> int:
        return self.master + self.moments

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def rank_bytes(recipe: Recipe, plan: Plan, stage: int, on_gpu: bool,
               data_rank: int = 0) -> RankBytes:
    """Bytes on a rank of a pipeline stage, as the recipe's engine holds them.

    Args:
        data_rank: which of the replicas, where they do not hold equally much.
    """
    held = ENGINES.get(recipe.engine).rank_bytes(recipe, plan, stage, on_gpu, data_rank)
    return replace(held, teacher=teacher_bytes(recipe))


def teacher_bytes(recipe: Recipe) -> int:
    """Bytes of a teacher's weights on a rank, in the training precision."""
    model, tensor = teacher_of(recipe), recipe.parallel.tensor
    if model is None:
        return 0
    elements = sum(w.numel // (1 if w.axis is None else tensor) for w in model.weights())
    return (2 if recipe.train.precision == "bf16" else 4) * elements


def sparse_bytes(
    model: Model, parallel: Parallel, plan: Plan, width: int, stage: int, on_gpu: bool
) -> tuple[int, int]:
    """Expanded copies, and masks with what is derived from them."""
    expanded = masks = 0
    for chunk in local_parameters(model, parallel, plan, stage):
        for parameter in (q for q in chunk if q.expands_to):
            weight = plan.weights[parameter.name]
            expanded += width * parameter.expands_to * plan.keeps_copy(parameter.name, on_gpu)
            slices, entries = weight.slices // parallel.tensor, math.prod(weight.slice_shape)
            masks += slices * math.ceil(entries / 8)
            masks += slices * math.ceil(weight.active_per_slice / 8) * (
                weight.algorithm.holds)
            masks += slices * math.ceil(entries / 8) * weight.algorithm.tracks
            masks += slices * weight.active_per_slice * weight.algorithm.tracks_ages
            if weight.algorithm.keeps:  # nothing is derived, and what is trained is a mask too
                masks += slices * math.ceil(entries / 8) * weight.trains_some
                continue
            masks += slices * 4 * math.ceil(entries / SPAN) if on_gpu else 8 * parameter.elements
            if on_gpu:
                masks += weight.pattern.table_bytes(parameter.elements)
    return expanded, masks


def zero_bytes(recipe: Recipe, plan: Plan, stage: int, zero_stage: int) -> RankBytes:
    """Bytes on a GPU of each ZeRO stage 0 to 3 (Rajbhandari et al. 2020, figure 1), without any
    engine's padding.

    ZeRO-1 shards the optimizer state over the data-parallel ranks, ZeRO-2 the gradients too, ZeRO-3
    the parameters too; then two layers at a time are gathered whole. Sparse weights are expanded in
    the forward pass and kept for the backward pass there, or with full recomputation for their
    layer's only. Stages 2 and 3 are DeepSpeed's.

    Raises:
        ValueError: no such stage.
    """
    if zero_stage not in range(4):
        raise ValueError(f"ZeRO has stages 0, 1, 2 and 3, not {zero_stage}")
    bf16 = recipe.train.precision == "bf16"
    width, data = 2 if bf16 else 4, recipe.parallel.data
    parameters = [q for chunk in local_parameters(recipe.model, recipe.parallel, plan, stage)
                  for q in chunk]
    elements = sum(q.elements for q in parameters)
    share = math.ceil(elements / data)
    expanded, masks = sparse_bytes(recipe.model, recipe.parallel, plan, width, stage, on_gpu=True)
    gathered = 0
    if zero_stage == 3:
        remade, layers = recipe.train.recompute == "full", {}
        for q in parameters:
            layers[q.layer] = layers.get(q.layer, 0) + q.elements + q.expands_to * remade
        largest = sorted((n for layer, n in layers.items() if 0 <= layer < recipe.model.layers),
                         reverse=True)
        gathered = width * sum(largest[:GATHERED_LAYERS])
        expanded = 0 if remade else width * sum(q.expands_to for q in parameters)
    owned = share if zero_stage >= 1 else elements
    return RankBytes(
        parameters=width * (share if zero_stage == 3 else elements),
        gradients=4 * (share if zero_stage >= 2 else elements),
        master=4 * owned if bf16 else 0,
        moments=recipe.state_bytes * owned,
        expanded=expanded,
        masks=masks,
        gathered=gathered,
        teacher=teacher_bytes(recipe),
    )


def render_layout(recipe: Recipe, plan: Plan) -> str:
    """The layout and the bytes per GPU of each pipeline stage, as text."""
    p = recipe.parallel
    parts = ("parameters", "gradients", "optimizer", "expanded", "masks",
             *(["teacher"] if recipe.distill.on else []), "total")
    columns = [Column("GiB per GPU", lambda row: f"stage {row[0]}"),
               *(Column(part, lambda row, part=part: getattr(row[1], part) / GIB.size, ".3f")
                 for part in parts)]
    stages = [(stage, rank_bytes(recipe, plan, stage, on_gpu=True)) for stage in range(p.pipeline)]
    lines = [
        f"layout: {render_parallel(recipe)}; {_render_micro_batches(recipe)} tokens",
        f"steps: {recipe.steps:,} of {recipe.tokens_per_step:,} tokens",
        Table(columns, stages).text("  ") + "  (without activations: tools/plan.py)"]
    return "\n".join(lines)


def _render_micro_batches(recipe: Recipe) -> str:
    size, length = recipe.train.micro_batch, recipe.train.sequence_length
    return f"micro-batches of {size} x {length}" if size == AUTO else (
        f"{counted(recipe.micro_batches, 'micro-batch', 'micro-batches')} of {size} x {length}")


def render_parallel(recipe: Recipe) -> str:
    """The layout in words, for example `8 ranks = tensor 2 + sequence x pipeline 2 x data 2,
    megatron ZeRO-1`."""
    p = recipe.parallel
    return (f"{counted(p.world, 'rank')} = tensor {p.tensor}"
            f"{' + sequence' if p.sequence else ''} x pipeline {p.pipeline}"
            f"{f' (interleave {p.interleave})' if p.interleave > 1 else ''} x data {p.data}, "
            f"{recipe.engine} ZeRO-{p.zero_stage}{' offloaded' if p.offload else ''}")
