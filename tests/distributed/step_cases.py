"""Cases of what a training step does beside matrix products."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import cases
from benchmarks import baselines
from benchmarks.breakdown import measure_parts
from cases import bench
from stage_cases import staged
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_spdf.engine import common
from megatron_spdf.model import decoder

# What makes the host wait for a GPU: values that Python sees, and shapes that depend on values.
SEEN = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__",
        "__array__", "nonzero"}
SHAPED = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
          "aten::_unique2",
          "aten::bincount"}


class Waits(TorchFunctionMode):
    """Counts calls from Python that make the host wait for the device, on CPU too, where nothing
    waits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in SEEN:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class ShapedByValues(TorchDispatchMode):
    """Counts operations inside PyTorch that do, but for those that `Waits` sees."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in SHAPED:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def waits(recipe: dict) -> dict[str, dict[str, int]]:
    """Transfers to the host in a training step and in an evaluation of a global batch."""
    with bench(recipe) as b:
        b.steps(0, 1)
        batch, found = next(b.data.training_batches(1)), {}
        for name, run in (("step",
                           lambda: b.engine.step(batch, 2, 2 * b.recipe.tokens_per_step, False)),
                          ("evaluation", lambda: b.engine.evaluate(batch, False))):
            with Waits() as waits, ShapedByValues() as shaped:
                run()
            found[name] = dict(waits.counts + shaped.counts)
        return found


BROKEN = {3: float("inf"), 5: float("nan")}  # step -> squared norm of its gradients


def updated(recipe: dict, ahead: bool) -> list[str]:
    """What seven steps give, of which two have no finite gradients: each's result, and all numbers
    that the model, the masters and the optimizer hold after it, summed."""
    with bench(recipe) as b:
        engine, found = b.engine, []
        engine.updates_ahead = ahead
        squared_norm = engine._squared_norm
        batches = b.data.training_batches(1)
        for number in range(1, 8):
            factor = BROKEN.get(number, 1.0)
            engine._squared_norm = lambda factor=factor: squared_norm() * factor
            result = engine.step(next(batches), number, number * b.recipe.tokens_per_step, False)
            found.append(f"{result} {engine.optimizer_steps} {held_by(engine)}")
        return found


def held_by(engine) -> list[float]:
    """Sums of absolute values: of parameters, of masters, and of each of the named state."""
    masters = common.masters_of(engine.torch_optimizer)
    states = [engine.torch_optimizer.state[master] for master in masters]
    return [sum(float(t.double().abs().sum()) for t in tensors) for tensors in (
        [p for model in engine.models for p in model.parameters()], masters,
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")))]


def fused(recipe: dict, steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms with Megatron-Core's fusions, which nothing compiles on CPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(decoder, "_compiles", lambda: True))
        return cases.train(recipe, steps)["curve"]


def masked_peer(recipe: dict) -> dict:
    """Gradient norms of the benchmark's peer that multiplies masks into dense weights; and whether
    each of its weights is zero where masked, and has learnt elsewhere."""
    with bench(recipe) as b:
        b.engine = baselines._MaskedEngine(b.engine)
        masks = b.engine.masks
        before = {p: p.detach().clone() for p in masks}
        norms = [norm for _, norm in b.steps(0, 2)]
        return {"norms": norms, "zero": [not p[~mask].any() for p, mask in masks.items()],
                "learnt": [bool((p != before[p])[mask].all()) for p, mask in masks.items()]}


def gathers_by_part(recipe: dict) -> dict[str, float]:
    """Seconds of the parts of a step as the benchmark has them, where every gather and scatter
    that DeepSpeed makes takes a tenth of a second longer; and how many there were."""
    made = []

    def slower(function):
        def run(*arguments, **keywords):
            made.append(function)
            time.sleep(0.1)
            return function(*arguments, **keywords)
        return run

    with bench(recipe) as b:
        own = b.engine.backend
        names = [call.rpartition(".")[2] for call, part in b.engine.timed.items()
                 if part == "communication"]
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(patch.object(own, name, slower(getattr(own, name))))
            parts = measure_parts(b.recipe, b.engine, range(1, 2))
    return {**parts, "made": len(made)}


def adam(recipe: dict) -> dict:
    """Which form of AdamW an engine has."""
    with bench(recipe) as b:
        adam = b.engine.torch_optimizer
        b.steps(0, 1)
        return {"fused": {group["fused"] for group in adam.param_groups},
                "choices": b.engine.choices,
                "steps": {float(state["step"]) for state in adam.state.values()}}


def tuned(recipes: list[dict], stops: list[int | None]) -> dict:
    """A run that chooses its micro-batch, started with each recipe in turn and stopped after so
    many steps; and a run in another directory with the number that it chose first."""
    there = staged(recipes, stops)
    chosen = json.loads((Path(recipes[0]["output"]) / "micro_batch.json").read_text())
    train = {**recipes[0]["train"], "micro_batch": chosen[0]["micro_batch"]}
    beside = {"train": train, "output": f"{recipes[0]['output']} fixed"}
    fixed = staged([recipes[0] | beside], [None])
    return {"auto": there, "chosen": chosen, "fixed": fixed}
