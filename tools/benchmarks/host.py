"""A model so small that the host may not launch fast enough for the GPU: how busy that is, and what
a CUDA graph of forward and backward, or compiled layers, would change.

A run of ours may have the graph (`kernels.cuda_graph`) and not the compiled layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import train
from benchmarks.engines import synthetic_batch
from megatron_spdf.recipe.recipe import Recipe


def compile_layers(engine) -> None:
    """Has `torch.compile` compile every layer at its first use."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch.compile would need a GPU")
    for model in engine.models:
        for layer in model.decoder.layers:
            layer.compile()


# name -> (overrides of the recipe, what is done to its engine)
WAYS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "launched one by one": ((), lambda engine: None),
    "one CUDA graph": (("kernels.cuda_graph=true",), lambda engine: None),
    "layers compiled": ((), compile_layers)}


def measure(recipe: Recipe, device: torch.device, prepare: Callable, steps: int) -> dict:
    """Figures of a run: those of all tables of training, the share of a step in which the GPU
    computes, and a loss that no way may change but by rounding.

    Args:
        prepare: what is done to the engine, of WAYS.
    """
    run = train.start(recipe, device, quick=True, prepare=prepare)
    try:
        for _ in range(train.STRETCHES):
            run.advance(max(1, steps // train.STRETCHES))
        figures, number = run.figures, run.step + 1
        busy = busy_seconds(lambda: train.take_steps(recipe, run.engine, range(number, number + 1)))
        loss = run.engine.step(synthetic_batch(recipe, number + 1), number + 1,
                               (number + 1) * recipe.tokens_per_step, False).loss
    finally:
        run.engine.close()
    busy = busy and 100 * busy / figures["step_seconds"]
    return {**train.row_of(figures), "GPU busy (%)": busy,
            f"loss of step {number + 1}": loss}


def busy_seconds(run: Callable[[], None]) -> float | None:
    """Seconds in which kernels and copies run on the GPU; None without one."""
    if not torch.cuda.is_available():
        run()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
