"""Everything the planner has to say about a recipe on so many GPUs, as plain values for text, JSON
and HTML."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_spdf.planning.activations import step_bytes
from megatron_spdf.planning.hardware import GPUS, Gpu
from megatron_spdf.planning.memory import rank_bytes, zero_bytes
from megatron_spdf.planning.moves import render_moves
from megatron_spdf.planning.parts import as_plain, bytes_of_stages, stored_plans
from megatron_spdf.planning.rates import MEASURED
from megatron_spdf.planning.search import (
    USABLE,
    Candidate,
    Misfit,
    fullest,
    holds,
    search,
    smallest_world,
    usable_worlds,
)
from megatron_spdf.planning.step_time import step_time, wire_bytes
from megatron_spdf.planning.traffic import route, step_traffic, wire_share
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import Flops, forward_flops, recipe_flops, training_flops
from megatron_spdf.schedule.stages import mean_flops, stages_of
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.sparsity.settings import Sparsity

LEVELS = (0.0, 0.5, 0.75, 0.9)  # compared beside the recipe's own sparsity


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        efficiency: of dense products, share of the GPU's peak; None: as measured, the host's pace
            included.
        source: where the efficiency comes from, in words.
        price: of a GPU hour, in any currency; None: no cost is given.
    """

    recipe: Recipe
    plan: Plan
    gpu: Gpu
    gpus: int
    efficiency: float | None
    source: str
    price: float | None = None
    top: int = 8


def make_overview(request: Request) -> dict[str, Any]:
    """Plain nested values, see the renderers for their meaning; bytes, seconds and FLOPs
    throughout.

    Raises:
        ValueError: no layout fits or is possible; by how much it misses, and the nearest that does.
    """
    recipe, plan, gpu = request.recipe, request.plan, request.gpu
    fitting, misfits = search(recipe, plan, gpu, request.gpus, request.efficiency)
    if not fitting:
        raise ValueError(_impossible(request, misfits))
    best = fitting[0]
    distinct: dict[tuple, Candidate] = {}
    for candidate in fitting:
        p = candidate.recipe.parallel
        distinct.setdefault((p.tensor, p.pipeline, p.data, p.interleave), candidate)
    return {
        "request": {"gpus": request.gpus, "gpu": asdict(gpu), "usable_bytes": USABLE * gpu.memory,
                    "efficiency": request.efficiency or MEASURED.products,
                    "efficiency_from": request.source, "price": request.price},
        "model": _model(recipe, plan),
        "flops": _flops(best.recipe, plan),
        "own_layout": _own_layout(request),
        "fitting": len(fitting),
        "layouts": [_row(c, request) for c in list(distinct.values())[: request.top]],
        "misfits": [{"tensor": m.recipe.parallel.tensor, "pipeline": m.recipe.parallel.pipeline,
                     "data": m.recipe.parallel.data, "reason": m.reason} for m in misfits],
        "best": {"memory": _memory(best.recipe, plan), "zero": _zero(best.recipe, plan),
                 "traffic": _traffic(best.recipe, plan, gpu), "time": asdict(best.time),
                 "wire": wire_bytes(step_traffic(best.recipe, plan, 0), best.recipe, gpu)},
        "sparsity": [_level(best.recipe, level, request) for level in _levels(recipe, plan)],
    }


def _model(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    weights = recipe.model.weights()
    linear = sum(w.numel for w in weights if w.linear)
    stages = stages_of(recipe)
    said = [render_moves(stage.as_single_run, stage.plan) for stage in stages]
    moves = list(dict.fromkeys(filter(None, said)))  # parts of a stage say the same
    return {
        "layers": recipe.model.layers, "hidden": recipe.model.hidden,
        "parameters": sum(w.numel for w in weights),
        "linear_weights": linear, "active": linear - plan.numel + plan.active,
        "sparsity": plan.sparsity,
        "tokens": recipe.steps * recipe.tokens_per_step, "steps": recipe.steps,
        "tokens_per_step": recipe.tokens_per_step, "precision": recipe.train.precision,
        "sequence_length": recipe.train.sequence_length,
        "stages": [stage.heading for stage in stages if stage.heading],
        "held": as_plain(bytes_of_stages(recipe)) if len(stages) > 1 else [],
        **({"moves": moves} if moves else {}),
    }


def _flops(recipe: Recipe, plan: Plan) -> list[dict[str, Any]]:
    """FLOPs per token by part, and of the whole run; `recipe` at the layout whose recomputation
    counts."""
    model, length = recipe.model, recipe.train.sequence_length
    tokens = recipe.steps * recipe.tokens_per_step
    stages = stages_of(recipe)
    kinds: dict[str, Flops] = {
        "forward only, active weights": forward_flops(model, length, plan),
        "training, dense": training_flops(model, length),
        "training, active weights": mean_flops(stages),
        "the same, causal attention": mean_flops(stages, "causal"),
        f"executed (expanded, causal, recompute {recipe.train.recompute})":
            recipe_flops(recipe, plan.skipped, "causal", recipe.train.recompute),
    }
    return [{"what": what, **asdict(f), "total": f.total, "run": f.total * tokens} for what,
            f in kinds.items()]


def _row(candidate: Candidate, request: Request) -> dict[str, Any]:
    recipe = candidate.recipe
    p, seconds = recipe.parallel, candidate.time.total
    hours = recipe.steps * seconds / 3600
    executed = recipe_flops(recipe, request.plan.skipped).total  # as the log counts MFU
    rate = candidate.tokens_per_second
    return {
        "tensor": p.tensor, "pipeline": p.pipeline, "data": p.data, "interleave": p.interleave,
        "sequence": p.sequence, "zero_stage": p.zero_stage, "micro_batch": recipe.train.micro_batch,
        "micro_batches": recipe.micro_batches, "recompute": recipe.train.recompute,
        "peak_bytes": candidate.peak, "fullest_stage": candidate.stage, "step_seconds": seconds,
        "tokens_per_second": rate, "hours": hours, "gpu_hours": hours * p.world,
        "mfu": rate * executed / p.world / request.gpu.peak(recipe.train.precision),
        "cost": hours * p.world * request.price if request.price is not None else None,
        "time": asdict(candidate.time),
    }


def _own_layout(request: Request) -> dict[str, Any] | None:
    """The recipe's layout as it stands, if it is for so many GPUs."""
    if request.recipe.parallel.world != request.gpus:
        return None
    candidate = fullest(request.recipe, *stored_plans(request.recipe, request.plan))
    time = step_time(request.recipe, request.plan, request.gpu, request.efficiency)
    row = _row(Candidate(request.recipe, candidate.peak, candidate.stage, time), request)
    return {**row, "fits": candidate.peak <= USABLE * request.gpu.memory}


def _memory(recipe: Recipe, plan: Plan) -> list[dict[str, Any]]:
    """Bytes by part of the first, a middle and the last stage."""
    last = recipe.parallel.pipeline - 1
    rows = []
    for stage in sorted({0, (last + 1) // 2, last}):
        state, step = rank_bytes(recipe, plan, stage, on_gpu=True), step_bytes(recipe, plan, stage)
        parts = {k: v for k, v in asdict(state).items()
                 if k not in ("gathered", "teacher") or k == "teacher" and v}
        parts |= {"activations": step.activations,
                  "temporaries": step.total - step.activations - step.communication,
                  "buffers": step.communication}
        rows.append({"stage": stage, **parts, "total": sum(parts.values()), "step": asdict(step)})
    return rows


def _zero(recipe: Recipe, plan: Plan) -> list[int]:
    """Bytes of the state of the first stage at ZeRO-0, 1, 2 and 3."""
    return [zero_bytes(recipe, plan, 0, stage).total for stage in range(4)]


def _traffic(recipe: Recipe, plan: Plan, gpu: Gpu) -> list[dict[str, Any]]:
    """Traffic by kind and operation: payload of the busiest stage, sparse and dense, and its
    way."""
    dense = Plan.of(at_level(recipe, 0.0))
    rows = []
    stages = {0, recipe.parallel.pipeline // 2, recipe.parallel.pipeline - 1}
    sent = {s: (step_traffic(recipe, plan, s), step_traffic(recipe, dense, s)) for s in stages}
    for key in sorted({k for both in sent.values() for k in both[0]}):
        stage = max(sent, key=lambda s: sent[s][0][key])
        way = route(key[0], recipe, gpu.gpus_per_node)
        payload, unmasked = (each[key] for each in sent[stage])
        rows.append({"kind": key[0], "operation": key[1], "ranks": way.ranks, "link": way.link,
                     "stage": stage,
                     "payload": payload, "wire": payload * wire_share(key[1], way.ranks),
                     "dense_payload": unmasked})
    return rows


def at_level(recipe: Recipe, level: float) -> Recipe:
    """The recipe with all its linear weights at one sparsity."""
    return recipe.model_copy(update={"sparsity": Sparsity(level=level, seed=recipe.sparsity.seed)})


def _levels(recipe: Recipe, plan: Plan) -> list[float | None]:
    """Sparsities to compare; None stands for the recipe's own where it is not a level of all linear
    weights with unstructured masks."""
    own = {w.level for w in plan.weights.values()}
    uniform = all(Plan.of(at_level(recipe, level)).weights == plan.weights for level in own)
    return sorted({*LEVELS, *(own if uniform else ())}) + ([] if uniform else [None])


def _level(recipe: Recipe, level: float | None, request: Request) -> dict[str, Any]:
    """What a run at a sparsity costs, at the best layout, and the fewest GPUs it needs."""
    other = recipe if level is None else at_level(recipe, level)
    plan = request.plan if level is None else Plan.of(other)
    total, dense = recipe_flops(recipe, plan).total, recipe_flops(recipe).total
    least = smallest_world(other, plan, request.gpu)
    data = [n for (kind, _),
            n in step_traffic(other, plan, 0).items() if kind in ("gradients", "parameters")]
    return {
        "sparsity": plan.sparsity, "recipe": plan.weights == request.plan.weights,
        "skips_zeros": bool(plan.skipped.weights),
        "run_flops": total * recipe.steps * recipe.tokens_per_step,
        "flops_ratio": total / dense,
        "peak_bytes": fullest(other, plan).peak, "data_traffic": sum(data),
        "fewest_gpus": least and least.recipe.parallel.world,
        "fewest_layout": least
        and {k: getattr(least.recipe.parallel, k) for k in ("tensor", "pipeline", "data")},
    }


def _impossible(request: Request, misfits: list[Misfit]) -> str:
    """Why nothing fits, by how much, and what does."""
    recipe, plan, gpu, gpus = request.recipe, request.plan, request.gpu, request.gpus
    if not misfits or misfits[0].excess is None:
        why = misfits[0].reason if misfits else (
            f"no tensor x pipeline divides that number (tensor divides model.query_groups="
            f"{recipe.model.slices} and a node's {gpu.gpus_per_node} GPUs, pipeline "
            f"model.layers={recipe.model.layers})")
        near = usable_worlds(recipe, gpu, gpus)
        return (f"{gpus} GPUs cannot be laid out: {why}. Numbers near it that can: "
                f"{', '.join(map(str, near)) or 'none'}")
    p = misfits[0].recipe.parallel
    lines = [f"no layout of {gpus} x {gpu.name} holds this run. The nearest, tensor {p.tensor} x "
             f"pipeline {p.pipeline} x data {p.data}, {misfits[0].reason}: "
             f"{USABLE * gpu.memory / 2**30:,.1f} of a GPU's {gpu.memory / 2**30:,.1f} GiB can be "
             "counted on. What does hold it:"]
    least = smallest_world(recipe, plan, gpu)
    if least:
        q = least.recipe.parallel
        lines.append(f"{q.world} x {gpu.name} (tensor {q.tensor} x pipeline {q.pipeline} x data "
                     f"{q.data})")
    for name, other in GPUS.items():
        if other.memory > gpu.memory and holds(recipe, plan, other, gpus):
            lines.append(f"{gpus} x {other.name} (--gpu {name})")
    for level in (s for s in LEVELS if s > plan.sparsity):
        sparser = at_level(recipe, level)
        if holds(sparser, Plan.of(sparser), gpu, gpus):
            lines.append(f"{gpus} x {gpu.name} with sparsity={level}")
            break
    return "\n  - ".join(lines if len(lines) > 1
                         else [*lines, "no number of GPUs up to 65,536; take a smaller model"])
