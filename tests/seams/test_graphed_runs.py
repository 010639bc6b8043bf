"""A run whose steps are CUDA graphs equals one launched one by one, bit for bit: with masks that
stay, move or are chosen by the weights, and after a resume."""

from __future__ import annotations

import pytest
import torch
from graph_cases import repeatable
from mask_cases import trained

pytestmark = [pytest.mark.gpu, pytest.mark.slow,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

STEPS = 14
MOVES = {"update": {"every": 4, "stop": 1.0}}
RUNS = {
    "static": {"sparsity": 0.75},
    "layer by layer": {"sparsity": {"level": 0.75, "dense_copy": "per_layer"}},
    "tiles": {"sparsity": {"level": 0.5, "pattern": "tile", "tile": 16}},
    "set": {"sparsity": {"level": 0.75, "algorithm": "set", **MOVES}},
    "rigl": {"sparsity": {"level": 0.75, "algorithm": "rigl", **MOVES}},
    "top_kast": {"sparsity": {"level": 0.75, "algorithm": "top_kast",
                              "update": {"backward": 2.0, "every": 4}}},
    "ste": {"sparsity": {"level": 0.75, "algorithm": "ste"}},
    "bf16": {"sparsity": 0.75, "train": {"precision": "bf16"}},
    "documents": {"sparsity": 0.75, "data": {"reset_attention": True}},
}


@pytest.fixture(scope="module")
def recipe(make_recipe):
    def make(graph: bool, output: str | None = None, **sections) -> dict:
        train = {"tokens": 8 * 32 * STEPS, **sections.pop("train", {})}
        return make_recipe(output, train=train, checkpoint={"asynchronous": False},
                           log={"every": 1}, kernels={"cuda_graph": graph}, **sections)
    return make


@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS)
def test_a_graph_changes_no_digit(ranks, recipe, sections):
    with_graph, without = (ranks(1, gpu=True).run(repeatable, recipe(graph, **sections))
                           for graph in (True, False))
    assert with_graph["losses"] == without["losses"]
    assert with_graph["masks"] == without["masks"]


def test_with_fused_attention_it_changes_rounding_alone(ranks, recipe):
    with_graph, without = (ranks(1, gpu=True).run(trained, recipe(graph, **RUNS["static"]))
                           for graph in (True, False))
    assert with_graph["losses"] == pytest.approx(without["losses"], abs=1e-5)


def test_a_graphed_run_resumes_bit_for_bit(ranks, recipe, tmp_path):
    gpu, sections = ranks(1, gpu=True), RUNS["set"]
    straight = gpu.run(repeatable, recipe(True, **sections))
    cut = recipe(True, str(tmp_path / "cut"), **sections)
    losses = [gpu.run(repeatable, cut, stop=6)["losses"], gpu.run(repeatable, cut)["losses"]]
    assert [*losses[0], *losses[1]] == straight["losses"]
