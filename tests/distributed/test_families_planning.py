"""The planner's bytes, traffic and activations for Llama and Qwen against what a step on CPU takes:
norms of queries and keys, biases, and more ranks than query groups."""

import sys
from pathlib import Path

import pytest
from cases import planned
from harness import world_of

from megatron_spdf.planning.activations import layer_bytes, sizes_of
from megatron_spdf.recipe.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "seams"))
from architecture_cases import kept_by_layer  # noqa: E402

pytestmark = pytest.mark.slow

SHAPE = {"hidden": 128, "heads": 4, "query_groups": 2, "ffn_hidden": 96, "slices": 4}
FAMILIES = {"qwen3": {"head_width": 64, "tied": False}, "qwen2": {"tied": True}, "llama": {}}
LAYOUTS = {"one": {}, "tp2": {"tensor": 2}, "tp2 sp": {"tensor": 2, "sequence": True},
           "tp4": {"tensor": 4}, "tp4 sp": {"tensor": 4, "sequence": True}, "pp2": {"pipeline": 2},
           "dp2": {"data": 2}}
RUNS = [("qwen3", "tp2"), ("qwen3", "tp4 sp"), ("qwen3", "pp2"), ("qwen2", "pp2"),
        ("llama", "tp4"), ("qwen2", "dp2")]


@pytest.fixture(scope="module")
def make(make_recipe):
    def of(family: str, parallel: dict, **train) -> dict:
        return make_recipe(model={"architecture": family, **SHAPE, **FAMILIES[family]},
                           parallel=parallel, train={"micro_batch": 1, **train})
    return of


@pytest.mark.parametrize(("family", "layout"), RUNS)
def test_bytes_traffic_and_activations(ranks, make, family, layout):
    recipe = make(family, LAYOUTS[layout])
    made = Recipe.model_validate(recipe | {"output": "none"})
    for rank, there in enumerate(ranks(world_of(recipe)).run_all(planned, recipe)):
        assert there["held"] == there["predicted"], rank
        assert there["sent"] == there["predicted to be sent"], rank
        # PyTorch's RMSNorm on CPU keeps its output before the product with the weight, too
        size, m = sizes_of(made), made.model
        by_head = (m.heads + max(m.query_groups, size.tensor)) * m.head_width * m.qk_norm
        on_cpu = m.layers * (2 * size.hidden + size.sharded(by_head))
        if size.tensor > m.query_groups:  # gloo scatters the gradients of Q, K, V by way of copies
            on_cpu += 2 * size.width * size.tokens * m.qkv_rows
        assert there["predicted to be alive"] == pytest.approx(there["alive"], rel=0.1,
                                                               abs=on_cpu), rank


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_closed_form_says(ranks, make, family):
    """To the byte, but for what PyTorch's RMSNorm keeps on CPU alone."""
    recipe = make(family, {})
    made = Recipe.model_validate(recipe | {"output": "none"})
    size, m = sizes_of(made), made.model
    on_cpu = 2 * size.hidden + size.sharded((m.heads + m.query_groups) * m.head_width * m.qk_norm)
    assert (ranks(1).run(kept_by_layer, recipe)
            == sum(layer_bytes(made).values()) + on_cpu)
