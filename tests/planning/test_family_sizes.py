"""The planner's bytes for Llama-3.2-1B, Qwen3-0.6B and Qwen2.5-0.5B at their full shapes against
buffers that Megatron-Core builds on the meta device, to the byte."""

import pytest

from megatron_spdf.planning.exact import dry_runs, ranks_of_interest
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.sparsity.plan import Plan

pytestmark = pytest.mark.slow

# Architecture, preset and what is changed of it, sparsity, layout, precision.
RUNS = {
    "llama": ("llama", {"preset": "llama_3_2_1b"}, 0.75,
              {"tensor": 4, "sequence": True, "pipeline": 2, "data": 2}, "bf16"),
    "qwen3": ("qwen3", {"preset": "qwen3_0_6b"}, 0.75, {"data": 2}, "bf16"),
    "untied qwen3": ("qwen3", {"preset": "qwen3_0_6b", "tied": False}, 0.75,
                     {"tensor": 2, "pipeline": 2, "interleave": 2, "data": 4}, "fp32"),
    "qwen2 over its groups": ("qwen2", {"preset": "qwen2_5_1_5b", "slices": 4}, 0.0,
                              {"tensor": 4, "pipeline": 2}, "bf16"),
}


def make(architecture: str, model: dict, level: float, parallel: dict, precision: str) -> Recipe:
    recipe = Recipe.model_validate({
        "output": "x", "optimizer": {"lr": 1e-3}, "sparsity": level, "parallel": parallel,
        "model": {"architecture": architecture, **model},
        "train": {"global_batch": 32, "micro_batch": 1, "tokens": 10**7, "precision": precision}})
    assert not list(rule_violations(recipe))
    return recipe


def test_every_kind_of_rank_holds_what_is_planned():
    recipes = [make(*run) for run in RUNS.values()]
    counts = dry_runs([(r, Plan.of(r), ranks_of_interest(r)) for r in recipes])
    for name, ranks in zip(RUNS, counts, strict=True):
        assert all(count.agrees for count in ranks), (name, ranks)
