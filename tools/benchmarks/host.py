"""A model so small that the host may not launch fast enough for the GPU: how busy that is, and what
a CUDA graph of forward and backward, or compiled layers, would change.

A run of ours has neither. These are what to compare before it gets one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch

from benchmarks import train
from benchmarks.engines import synthetic_batch
from megatron_spdf.recipe.recipe import Recipe


@contextmanager
def one_graph() -> Iterator[None]:
    """Within, an engine's forward and backward of a step are one CUDA graph from the second step
    on, by Megatron-Core's own wrapper. Its engines are built within too: PyTorch captures no
    gradient whose node belongs to the default stream. Models have no dropout."""
    from megatron.core import full_cuda_graph
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

    from megatron_spdf.engine import megatron

    _require_gpu("CUDA graphs")
    both = {"training": None, "validation": None}
    fresh = [(FullCudaGraphWrapper, "curr_iteration", dict.fromkeys(both, 0)),
             (FullCudaGraphWrapper, "cuda_graph", dict(both)),
             (FullCudaGraphWrapper, "result", dict(both)),
             # none is drawn from, and the tracker that a run uses has states that no graph takes
             (full_cuda_graph, "get_all_rng_states", dict),
             (StaticBufferLoader, "static_buffers", {name: [] for name in both})]
    with ExitStack() as stack:
        for owner, name, value in fresh:  # which it keeps in its classes
            stack.enter_context(patch.object(owner, name, value))
        graphed = FullCudaGraphWrapper(megatron.get_forward_backward_func(),
                                       cuda_graph_warmup_steps=1)
        stack.enter_context(patch.object(megatron, "get_forward_backward_func", lambda: graphed))
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        yield
        torch.cuda.synchronize()


def compile_layers(engine) -> None:
    """Has `torch.compile` compile every layer at its first use."""
    _require_gpu("torch.compile")
    for model in engine.models:
        for layer in model.decoder.layers:
            layer.compile()


def _require_gpu(what: str) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(f"{what} would need a GPU")


# name -> (what surrounds a run, what is done to its engine)
WAYS: dict[str, tuple[Callable[[], AbstractContextManager], Callable]] = {
    "launched one by one": (nullcontext, lambda engine: None),
    "one CUDA graph": (one_graph, lambda engine: None),
    "layers compiled": (nullcontext, compile_layers)}


def measure(recipe: Recipe, device: torch.device, way: str, steps: int) -> dict:
    """Figures of a run: those of all tables of training, the share of a step in which the GPU
    computes, and a loss that no way may change.

    Args:
        way: of WAYS.
    """
    from benchmarks.suite_parts import row_of_training

    around, prepare = WAYS[way]
    with around():
        run = train.start(recipe, device, quick=True, prepare=prepare)
        try:
            for _ in range(train.STRETCHES):
                run.advance(max(1, steps // train.STRETCHES))
            figures, number = run.figures, run.step + 1
            busy = busy_seconds(lambda: train.take_steps(recipe, run.engine,
                                                         range(number, number + 1)))
            loss = run.engine.step(synthetic_batch(recipe, number + 1), number + 1,
                                   (number + 1) * recipe.tokens_per_step, False).loss
        finally:
            run.engine.close()
    busy = busy and 100 * busy / figures["step_seconds"]
    return {**row_of_training(figures), "GPU busy (%)": busy,
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
