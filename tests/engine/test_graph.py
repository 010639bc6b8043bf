"""What a graph is captured of and when it is dropped, with a graph that only counts."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from megatron_spdf.engine import graph
from megatron_spdf.engine.graph import GraphedPass, own_stream
from megatron_spdf.layers.compact import (
    CompactWeight,
    collect_dense_gradients,
    drop_dense_gradients,
    make_compact,
)
from megatron_spdf.layers.masked import MaskedWeight, choose_masks
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS
from megatron_spdf.sparsity.patterns.unstructured import Unstructured
from megatron_spdf.sparsity.plan import SparseWeight

CPU = torch.device("cpu")


def batch(size: int = 3) -> list[dict]:
    return [{"tokens": torch.arange(size) + i} for i in range(2)]


class Counted:
    """A pass, and graphs that replay it as CUDA's do: on the inputs that they were captured of."""

    def __init__(self, monkeypatch, model: nn.Module):
        self.done: list[str] = []
        counted = self

        class Graph:
            def replay(self) -> None:
                counted.done.append("replayed")
                self.loss.copy_(counted.sums(self.inputs))

            def reset(self) -> None:
                counted.done.append("dropped")

        @contextmanager
        def capture(made: Graph, **_):
            self.capturing = made
            yield
            self.capturing = None

        self.capturing = None
        monkeypatch.setattr(graph.torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(graph.torch.cuda, "graph", capture)
        self.run = GraphedPass(self.launch, [model], CPU)

    def launch(self, micros: list[dict]) -> torch.Tensor:
        if self.capturing is None:
            self.done.append("launched")
            return self.sums(micros)
        self.done.append("captured")
        self.capturing.inputs, self.capturing.loss = micros, torch.zeros(())
        return self.capturing.loss

    @staticmethod
    def sums(micros: list[dict]) -> torch.Tensor:
        return sum(micro["tokens"].sum() for micro in micros).float()

    def passes(self, *batches: list[dict]) -> list[str]:
        """What each brought about; every loss is that of its own batch."""
        self.done.clear()
        for micros in batches:
            assert self.run(micros) == self.sums(micros)
        return list(self.done)


def sparse_layer(algorithm: str = "static", kind: type = CompactWeight, *more) -> nn.Module:
    weight = SparseWeight("w", (8, 16), 0, 2, 0.5, Unstructured(),
                          algorithm=ALGORITHMS.get(algorithm)())
    layer = nn.Linear(16, 8, bias=False)
    make_compact(layer, kind(weight, 1, 0, 1, CPU, None, *more))
    return layer


def test_the_second_pass_is_captured_and_later_ones_replayed_with_their_own_batch(monkeypatch):
    counted = Counted(monkeypatch, sparse_layer())
    batches = [[{"tokens": torch.tensor([i])}] for i in range(4)]
    assert counted.passes(*batches) == ["launched", "captured", "replayed", "replayed",
                                        "replayed"]


def test_a_batch_of_another_shape_drops_the_graph(monkeypatch):
    counted = Counted(monkeypatch, sparse_layer())
    counted.passes(batch(), batch())
    assert counted.passes(batch(5), batch(5)) == ["dropped", "launched", "captured", "replayed"]


def test_a_mask_that_moves_drops_the_graph(monkeypatch):
    layer = sparse_layer("set")
    counted = Counted(monkeypatch, layer)
    counted.passes(batch(), batch())
    compact = layer.parametrizations.weight[0]
    compact.move_mask(compact.mask_bits.flip(0))
    assert counted.passes(batch(), batch()) == ["dropped", "launched", "captured", "replayed"]


def test_a_step_that_collects_the_dense_gradient_is_launched_one_by_one(monkeypatch):
    layer = sparse_layer("rigl")
    counted = Counted(monkeypatch, layer)
    counted.passes(batch(), batch())
    collect_dense_gradients([layer], last_of=0)
    assert counted.passes(batch(), batch()) == ["dropped", "launched", "launched"]
    drop_dense_gradients([layer])
    assert counted.passes(batch(), batch(), batch()) == ["launched", "captured", "replayed",
                                                         "replayed"]


def test_a_step_in_which_weights_choose_their_masks_is_launched_one_by_one(monkeypatch):
    layer = sparse_layer("ste", MaskedWeight, 1)
    counted = Counted(monkeypatch, layer)
    assert counted.passes(batch(), batch()) == ["launched", "launched"]
    _ = layer.weight  # chosen
    assert counted.passes(batch(), batch()) == ["launched", "captured", "replayed"]
    choose_masks([layer])
    assert counted.passes(batch()) == ["dropped", "launched"]


def test_entries_that_are_held_drop_the_graph(monkeypatch):
    layer = sparse_layer("gmp")
    counted = Counted(monkeypatch, layer)
    counted.passes(batch(), batch())
    compact = layer.parametrizations.weight[0]
    compact.hold(torch.ones(compact.values_shape, dtype=torch.bool))
    assert counted.passes(batch()) == ["dropped", "launched"]


def test_without_a_gpu_there_is_no_graph():
    with pytest.raises(ValueError, match="kernels.cuda_graph=true needs a GPU, and this is cpu"):
        own_stream(CPU)
