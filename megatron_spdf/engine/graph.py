"""Forward and backward of a step as one CUDA graph, so that the host launches one thing and not
thousands.

A graph repeats what it has captured: the same kernels on the same memory. What the host decides
from pass to pass must therefore be as it was at the capture, or the pass is launched one by one: a
mask that moved, a weight that chooses its mask, a collector of the dense gradient, a batch of
another shape. Such a pass is also the warm-up of the next graph, which the pass after it captures.

Megatron-Core's own wrapper (`FullCudaGraphWrapper`) captures once in a process, for all engines,
and never drops what it has captured; masks that move need another graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from megatron_spdf.layers.compact import compact_of, sparse_modules
from megatron_spdf.model.batch import MicroBatch

Pass = Callable[[Sequence[MicroBatch]], Tensor]  # of all micro-batches of a step; the loss, ()


class GraphedPass:
    """A pass that is captured once and then replayed.

    Args:
        run: the pass, which leaves gradients in the buffers of the parameters.
        models: whose pass it is; they were built within `own_stream`.
        device: theirs.
    """

    def __init__(self, run: Pass, models: Sequence[nn.Module], device: torch.device):
        self._run, self._device = run, device
        self._weights = [compact_of(m) for model in models for m in sparse_modules(model)]
        self._parameters = [p for model in models for p in model.parameters()]
        self._inputs: list[MicroBatch] = []  # on the device, where the graph reads them
        self._loss: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._basis: Hashable = None  # of the last pass; what the graph goes by, if there is one

    def __call__(self, batch: Sequence[MicroBatch]) -> Tensor:
        """The loss of a step's micro-batches, ()."""
        basis = self._read_basis(batch)
        if basis is None or basis != self._basis:
            self._drop()
            loss = self._run(batch)
            self._basis = self._read_basis(batch)  # the pass may have settled what was open
            return loss
        if self._graph is None:
            self._inputs = [{name: torch.empty_like(value, device=self._device)
                             for name, value in micro.items()} for micro in batch]
        for kept, micro in zip(self._inputs, batch, strict=True):
            for name, value in micro.items():
                kept[name].copy_(value, non_blocking=True)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._loss

    def _read_basis(self, batch: Sequence[MicroBatch]) -> Hashable:
        """What decides which kernels a pass launches, and on which memory; None: not as the next
        one will."""
        weights = [weight.basis for weight in self._weights]
        if None in weights:
            return None
        return (tuple(weights), tuple(p.data_ptr() for p in self._parameters),
                tuple((name, value.shape, value.dtype) for micro in batch
                      for name, value in micro.items()))

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # The graph has memory of its own: what the pass before left cached would come on top of it,
        # and `torch.cuda.graph` gives that back before it begins. Other threads may use the device.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = self._run(self._inputs)

    def _drop(self) -> None:
        if self._graph is not None:
            self._graph.reset()
        self._inputs, self._loss, self._graph = [], None, None


def own_stream(device: torch.device) -> None:
    """Has this thread launch on a stream of its own from now on.

    PyTorch captures no gradient whose node belongs to the default stream, and nodes belong to the
    stream on which a model was wrapped.

    Raises:
        ValueError: the device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"kernels.cuda_graph=true needs a GPU, and this is {device.type}; set "
                         "kernels.cuda_graph=false")
    torch.cuda.synchronize(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
