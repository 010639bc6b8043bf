"""How long a step takes: a roofline of the slowest stage, the pipeline's bubble, traffic that
nothing hides, and a host that may launch too slowly.

Matrix products, attention and what moves bytes through a GPU's memory take the measured rates of
`rates.py`; links have their full rate. Unstructured sparse weights are expanded, so products run at
their dense cost: the model says what our engine does, not what sparsity could do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_spdf.architecture.base import Model
from megatron_spdf.planning.activations import sizes_of
from megatron_spdf.planning.buffers import lay_out, local_parameters
from megatron_spdf.planning.hardware import Gpu
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.rates import MEASURED, Rates
from megatron_spdf.planning.traffic import Route, Traffic, route, step_traffic, wire_share
from megatron_spdf.recipe.distillation import teacher_of
from megatron_spdf.recipe.recipe import Parallel, Recipe
from megatron_spdf.schedule.flops import forward_flops
from megatron_spdf.sparsity.plan import Plan

FLASH_BACKWARD = 2.5  # forwards: five products where the forward has two (Dao 2023, section 3.1)
LOGIT_PASSES = 3  # (T, B, V / t): read for sums, read for and written by the gradient
# The same in fp32 of distillation, one operation after the other: cast (1.5), maximum (1), subtract
# (2), exponential (2), sum (1), scale (2), cast back (1.5), for three tensors.
DISTILLATION_PASSES = 33


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest stage.

    Attributes:
        compute: matrix products and attention, recomputation included, of all micro-batches.
        memory: norms, activations, biases, logits, expanding and compressing sparse weights.
        tensor: tensor-parallel traffic that no product hides.
        pipeline: sends between stages.
        bubble: stages waiting for each other.
        data: gradients and parameters that are not hidden behind the last backward and the first
            forward.
        update: the optimizer.
        host: what the host takes longer to launch a step than the GPU to run it.
    """

    compute: float
    memory: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    update: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.compute
            + self.memory
            + self.tensor
            + self.pipeline
            + self.bubble
            + self.data
            + self.update
            + self.host
        )


def step_time(recipe: Recipe, plan: Plan, gpu: Gpu, efficiency: float | None = None) -> StepTime:
    """Seconds of a step; the stage that takes longest, the first or the last, sets the pace of
    all.

    Args:
        efficiency: share of the peak that dense products reach, as a run of the user's had it; then
            the host counts as nothing. None: what was measured, the host included.
    """
    return predicted_step(recipe, plan, gpu,
                          MEASURED if efficiency is None else MEASURED.at(efficiency))


def predicted_step(recipe: Recipe, plan: Plan, gpu: Gpu, rates: Rates) -> StepTime:
    """`step_time` with given rates."""
    stages = {0, recipe.parallel.pipeline - 1}
    return max((_with_host(_stage_time(recipe, plan, gpu, rates, s), recipe, plan, rates)
                for s in stages), key=lambda t: t.total)


def _with_host(there: StepTime, recipe: Recipe, plan: Plan, rates: Rates) -> StepTime:
    """Adds the seconds that the GPU waits for what launches layer after layer."""
    if recipe.kernels.cuda_graph:
        return there
    launches = recipe.micro_batches * _layers(recipe) * rates.host_seconds(plan)
    return replace(there, host=max(0.0, launches - there.total))


def _stage_time(recipe: Recipe, plan: Plan, gpu: Gpu, rates: Rates, stage: int) -> StepTime:
    p, many = recipe.parallel, recipe.micro_batches
    rate = gpu.peak(recipe.train.precision) * rates.products
    forward, backward = (flops / rate for flops in _executed(recipe, plan, rates, stage))
    bandwidth = gpu.memory_bandwidth * rates.memory
    moved = _bytes_moved(recipe, plan, stage) / bandwidth
    sent = step_traffic(recipe, plan, stage)

    def seconds(kind: str) -> float:
        return sum(_wire_seconds(kind, op, n, recipe, gpu) for (k, op),
                   n in sent.items() if k == kind)

    # Backward, the reduction of an input's gradient runs beside the product of the weight's
    # gradient.
    tensor = seconds("tensor") / many
    tensor = max(tensor / 2, tensor - backward / 2)
    # interleaved, sends run behind compute
    pipeline = 0.0 if p.interleave > 1 else seconds("pipeline") / many
    micro_batch = forward + backward + moved + tensor + pipeline
    rounds = many if p.zero_stage >= 2 else 1  # of data-parallel traffic in a step
    held = rank_bytes(recipe, plan, stage, on_gpu=True)
    update = 2 * (held.optimizer + held.gradients
                  // (p.data if p.zero_stage == 1 else 1)) + held.parameters
    return StepTime(
        compute=many * (forward + backward),
        memory=many * moved + _expand_bytes(recipe, plan, stage) / bandwidth,
        tensor=many * tensor,
        pipeline=many * pipeline + seconds("embedding"),
        bubble=(p.pipeline - 1) / p.interleave * micro_batch,
        data=rounds * (_exposed(seconds("gradients") / rounds, backward, recipe, plan, stage)
                       + _exposed(seconds("parameters") / rounds, forward, recipe, plan, stage)),
        update=update / gpu.memory_bandwidth,
    )


def _executed(recipe: Recipe, plan: Plan, rates: Rates, stage: int) -> tuple[float, float]:
    """FLOPs for one micro-batch of dense products that take a rank as long as what it executes,
    (forward, backward with what is recomputed). Expanded weights cost what dense ones do; where
    zeros are skipped, active weights cost it, at the rate of their pattern."""
    m, t = recipe.model, recipe.train
    tokens = t.micro_batch * t.sequence_length
    whole = forward_flops(m, t.sequence_length, None, "causal")
    share = tokens / recipe.parallel.tensor
    other = 2.0 * sum((w.active if w.skips_zeros else w.numel) / rates.relative(w) - w.numel
                      for w in plan.weights.values())
    linear, attention = (share * part * _layers(recipe) / m.layers
                         for part in (whole.linear + other, whole.attention / rates.attention))
    logits = (
        share * whole.logits * m.padded_vocab / m.vocab_size
        if stage == recipe.parallel.pipeline - 1
        else 0.0
    )
    again = linear * (t.recompute == "full") + attention * (t.recompute != "none")
    teacher = teacher_of(recipe)
    taught = 0.0
    if teacher:
        there = forward_flops(teacher, t.sequence_length, None, "causal")
        taught = share * (there.linear + there.attention / rates.attention + there.logits)
    return (linear + attention + logits + taught,
            2.0 * (linear + logits) + FLASH_BACKWARD * attention + again)


@lru_cache(maxsize=4096)
def _elements(model: Model, parallel: Parallel, plan: Plan,
              stage: int) -> tuple[int, int, int, int]:
    """(elements of dense parameters, of compact ones that are expanded, of what these expand to, of
    compact ones that are multiplied as they are) on a rank."""
    local = [q for chunk in local_parameters(model, parallel, plan, stage) for q in chunk]
    direct = {q.name for q in local if q.expands_to and plan.skips_zeros(q.name)}
    return (sum(q.elements for q in local if not q.expands_to),
            sum(q.elements for q in local if q.expands_to and q.name not in direct),
            sum(q.expands_to for q in local if q.name not in direct),
            sum(q.elements for q in local if q.name in direct))


def _bytes_moved(recipe: Recipe, plan: Plan, stage: int) -> float:
    """Bytes that one micro-batch moves through a rank's memory outside of matrix products."""
    m, p, size = recipe.model, recipe.parallel, sizes_of(recipe)
    # backward moves about twice as many as forward
    moved = _layers(recipe) * m.forward_passes(size) * (3 + (recipe.train.recompute == "full"))
    if stage == p.pipeline - 1:
        passes = 4 * DISTILLATION_PASSES if recipe.distill.on else size.width * LOGIT_PASSES
        moved += passes * size.tokens * m.padded_vocab // p.tensor
    # Weight gradients are written, and read to be added to the fp32 buffer; those of sparse weights
    # are written dense, and read with the mask's bits, of which hardly a sector has no active
    # entry; where zeros are skipped they are only added.
    dense, active, whole, direct = _elements(m, p, plan, stage)
    moved += (2 * size.width + 8) * dense + 8 * (active + direct) + (2 * size.width + 1 / 8) * whole
    return moved + (2 * _expand_once(recipe, plan, stage) if plan.dense_copy == "per_layer"
                    else 0.0)


def _layers(recipe: Recipe) -> int:
    """Transformer layers on a rank."""
    return recipe.model.layers // recipe.parallel.pipeline


def _expand_bytes(recipe: Recipe, plan: Plan, stage: int) -> float:
    """Bytes of the dense copies that are kept for a step."""
    return _expand_once(recipe, plan, stage) if plan.dense_copy == "per_step" else 0.0


def _expand_once(recipe: Recipe, plan: Plan, stage: int) -> float:
    """Values and the mask's bits are read, dense weights written."""
    _, active, whole, _ = _elements(recipe.model, recipe.parallel, plan, stage)
    width = sizes_of(recipe).width
    return width * (whole + active) + whole / 8


def _wire_seconds(kind: str, operation: str, payload: int, recipe: Recipe, gpu: Gpu) -> float:
    """Seconds of one kind of traffic by itself: what a ring sends over the link, or the lanes'
    share over the way out of the node, whichever takes longer. Latency is left out."""
    way: Route = route(kind, recipe, gpu.gpus_per_node)
    sent = payload * wire_share(operation, way.ranks)
    if way.link == "inside node":
        return sent / gpu.link
    return max(sent / gpu.link if way.lanes > 1 else 0.0, sent / (way.lanes * gpu.network))


def _exposed(traffic: float, compute: float, recipe: Recipe, plan: Plan, stage: int) -> float:
    """Seconds of data-parallel traffic that a micro-batch's `compute` does not hide. The first
    stage sends bucket after bucket, at least the last of them behind nothing; later stages send all
    at once while they wait for it."""
    p = recipe.parallel
    if not p.overlap:
        return traffic
    if stage > 0:
        return max(0.0, traffic - stage * compute / p.interleave)
    buckets = sum(len(b.buckets) for b in lay_out(recipe.model, p, plan, stage, on_gpu=True))
    return max(traffic / buckets, traffic - compute)


def wire_bytes(sent: Traffic, recipe: Recipe, gpu: Gpu) -> dict[str, float]:
    """Bytes that a rank puts on each link in a step: link -> bytes."""
    total = {"inside node": 0.0, "between nodes": 0.0}
    for (kind, operation), payload in sent.items():
        way = route(kind, recipe, gpu.gpus_per_node)
        total[way.link] += payload * wire_share(operation, way.ranks)
    return total
