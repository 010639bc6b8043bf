"""Plans of recipes unlike each other, down to every figure.

`python tests/planning/stored_plans.py` stores them in stored_plans.json and stored_plan.txt anew.
That is right after a change that means to change the planner's figures, once the tests that hold
them against buffers and steps pass: tests/planning/test_exact.py and
tests/distributed/test_planning.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from megatron_spdf.architecture.base import Model  # noqa: E402
from megatron_spdf.planning.activations import peak_bytes, step_bytes  # noqa: E402
from megatron_spdf.planning.hardware import Gpu  # noqa: E402
from megatron_spdf.planning.memory import rank_bytes, zero_bytes  # noqa: E402
from megatron_spdf.planning.moves import moves_of, transient_bytes  # noqa: E402
from megatron_spdf.planning.overview import Request, make_overview  # noqa: E402
from megatron_spdf.planning.rates import Rates  # noqa: E402
from megatron_spdf.planning.step_time import step_time, wire_bytes  # noqa: E402
from megatron_spdf.planning.traffic import step_traffic  # noqa: E402
from megatron_spdf.recipe.recipe import Recipe  # noqa: E402
from megatron_spdf.schedule.flops import training_flops  # noqa: E402
from megatron_spdf.schedule.stages import mean_flops, stages_of  # noqa: E402
from megatron_spdf.sparsity.plan import Plan  # noqa: E402

STORED, TEXT = HERE / "stored_plans.json", HERE / "stored_plan.txt"


class Modern(Model):
    """RMSNorm, rotary positions, SwiGLU, no biases, an LM head of its own."""

    name: ClassVar = "modern"
    norm: ClassVar = "RMSNorm"
    norm_eps: ClassVar = 1e-6
    activation: ClassVar = "silu"
    gated: ClassVar = True
    biases: ClassVar = False
    positions: ClassVar = "rotary"
    rotary_base: ClassVar = 10_000.0
    tied: ClassVar = False


# Sizes that divide each other as little as they may, so that no two figures are alike by chance.
MODEL = {"layers": 12, "hidden": 120, "heads": 12, "query_groups": 6, "ffn_hidden": 414,
         "vocab_size": 1000, "max_positions": 96, "dropout": 0.1}
TRAIN = {"tokens": 144 * 72 * 40, "global_batch": 144, "micro_batch": 3, "sequence_length": 72}
RIGL = {"level": 0.75, "algorithm": "rigl", "update": {"every": 4, "newborn": "plain"}}
# name -> (sections of the recipe, whether the model is modern)
RECIPES: dict[str, tuple[dict[str, Any], bool]] = {
    "fp32, rules, tp3 sp pp2 interleaved dp4": ({
        "sparsity": {"level": 0.5, "rules": [{"weights": "*.mlp.*", "level": 0.8},
                                             {"weights": "*.1.self_attention.*", "level": 0.0}]},
        "train": {"precision": "fp32"},
        "parallel": {"tensor": 3, "sequence": True, "pipeline": 2, "interleave": 3, "data": 4}},
        False),
    "recomputed, tiles, tp2 pp3 dp2, zero 0": ({
        "sparsity": {"level": 0.75, "pattern": "tile", "tile": 16},
        "model": {"hidden": 192, "ffn_hidden": 768},
        "train": {"recompute": "full", "label_smoothing": 0.1},
        "parallel": {"tensor": 2, "pipeline": 3, "data": 2, "zero_stage": 0}}, False),
    "selective, per layer, tp6 dp3, not overlapped": ({
        "sparsity": {"level": 0.6, "dense_copy": "per_layer"},
        "train": {"recompute": "selective"},
        "parallel": {"tensor": 6, "data": 3, "overlap": False}}, False),
    "pp4 interleaved, large vocabulary": ({
        "sparsity": 0.9, "model": {"vocab_size": 400_000},
        "parallel": {"pipeline": 4, "interleave": 3}}, False),
    "deepspeed zero 3, recomputed, moved": ({
        "engine": "deepspeed", "sparsity": RIGL, "train": {"recompute": "full"},
        "parallel": {"tensor": 2, "sequence": True, "data": 8, "zero_stage": 3}}, False),
    "tiles, several micro-batches": ({
        "sparsity": {"level": 0.75, "pattern": "tile", "tile": 16},
        "model": {"hidden": 192, "ffn_hidden": 768}}, False),
    "tiles, recomputed, few tokens": ({
        "sparsity": {"level": 0.75, "pattern": "tile", "tile": 16},
        "model": {"hidden": 192, "ffn_hidden": 768},
        "train": {"recompute": "full", "sequence_length": 2, "micro_batch": 1}}, False),
    "unstructured, recomputed, few tokens": ({
        "sparsity": 0.75,
        "train": {"recompute": "full", "sequence_length": 2, "micro_batch": 1}}, False),
    "2:4, tp2": ({"sparsity": {"level": 0.5, "pattern": "2:4"},
                  "model": {"hidden": 192, "ffn_hidden": 768}, "parallel": {"tensor": 2}}, False),
    "deepspeed zero 2, offloaded": ({
        "engine": "deepspeed", "sparsity": 0.5,
        "parallel": {"data": 6, "zero_stage": 2, "offload": True}}, False),
    "deepspeed zero 1, moved": ({
        "engine": "deepspeed", "sparsity": {**RIGL, "algorithm": "set"},
        "parallel": {"data": 2}}, False),
    "moved, pp2 dp2": ({"sparsity": RIGL, "parallel": {"pipeline": 2, "data": 2}}, False),
    "stages": ({"stages": [{"share": 0.7, "sparsity": 0.75}, {"share": 0.2, "sparsity": 0.5},
                           {"share": 0.1, "sparsity": 0.0}]}, False),
    "modern, tp3 sp pp2 dp2": ({
        "sparsity": 0.5,
        "parallel": {"tensor": 3, "sequence": True, "pipeline": 2, "data": 2}}, True),
    "modern, recomputed, fp32": ({
        "sparsity": 0.75, "train": {"recompute": "full", "precision": "fp32"}}, True),
}
LARGE = {"layers": 12, "hidden": 10240, "heads": 80, "query_groups": 40, "ffn_hidden": 40960,
         "vocab_size": 50257, "max_positions": 2048}
LONG = {"tokens": 10**11, "global_batch": 144, "micro_batch": 3, "sequence_length": 2048}
RECIPES |= {
    "16B, tp2 pp3 dp4": ({
        "model": LARGE, "train": LONG, "sparsity": 0.6,
        "parallel": {"tensor": 2, "pipeline": 3, "data": 4}}, False),
    "16B, rules, per layer, fp32": ({
        "model": LARGE, "train": {**LONG, "precision": "fp32"},
        "sparsity": {"level": 0.5, "dense_copy": "per_layer",
                     "rules": [{"weights": "*.mlp.*", "level": 0.8}]}}, False)}
# Nodes of six, so that groups lie inside and across them.
GPU = Gpu("six", 300e12, 20e12, 2 * 2**30, 1.5e12, 200e9, 30e9, 6)
SLOW = Gpu("slow", 300e12, 20e12, 2 * 2**30, 1.5e12, 3e9, 5e9, 6)
# Whose overview is stored: recipe, GPUs, bytes of a GPU, price.
OVERVIEWS = (("16B, tp2 pp3 dp4", 24, 50 * 2**30, 2.5),
             ("16B, rules, per layer, fp32", 18, 70 * 2**30, None))


def recipe_of(name: str) -> Recipe:
    """A recipe of RECIPES."""
    sections, modern = RECIPES[name]
    values = {"output": "run", "optimizer": {"lr": 1e-3}, **sections,
              "model": MODEL | sections.get("model", {}),
              "train": TRAIN | sections.get("train", {})}
    recipe = Recipe.model_validate(values)
    return recipe.model_copy(update={"model": Modern(**MODEL)}) if modern else recipe


# Of seconds: rates that are measured anew change no stored figure.
at_fixed_rates = patch("megatron_spdf.planning.step_time.MEASURED", Rates(0.6, 1.0, 1.0))


@at_fixed_rates
def figures_of(name: str) -> dict[str, Any]:
    """Figures of a recipe, by pipeline stage where they differ."""
    recipe = recipe_of(name)
    plan, last = Plan.of(recipe), recipe.parallel.data - 1
    convention = training_flops(recipe.model, recipe.train.sequence_length, plan, "causal",
                                recipe.train.recompute)
    return {
        "flops": [asdict(convention), asdict(mean_flops(stages_of(recipe)))],
        "seconds": [asdict(step_time(recipe, plan, gpu, 0.45)) for gpu in (GPU, SLOW)],
        "stages": [{
            "step": asdict(step_bytes(recipe, plan, stage)),
            "held": asdict(rank_bytes(recipe, plan, stage, True, last)),
            "held on a CPU": asdict(rank_bytes(recipe, plan, stage, False)),
            "zero": [asdict(zero_bytes(recipe, plan, stage, zero)) for zero in range(4)],
            "moves": [transient_bytes(recipe, plan, stage), asdict(moves_of(recipe, plan, stage))],
            "peak": peak_bytes(recipe, plan, stage),
            "sent": {" ".join(key): n for key, n in step_traffic(recipe, plan, stage).items()},
            "wire": wire_bytes(step_traffic(recipe, plan, stage), recipe, GPU),
        } for stage in range(recipe.parallel.pipeline)],
    }


@at_fixed_rates
def overview_of(name: str, gpus: int, memory: float, price: float | None) -> dict[str, Any]:
    """The overview of a recipe of RECIPES."""
    recipe = recipe_of(name)
    gpu = Gpu(GPU.name, GPU.bf16, GPU.fp32, memory, GPU.memory_bandwidth, GPU.link, GPU.network, 6)
    return make_overview(Request(recipe, Plan.of(recipe), gpu, gpus, 0.45, "measured", price))


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    from megatron_spdf.planning.render import render_overview

    found = {"recipes": {name: figures_of(name) for name in RECIPES},
             "overviews": [overview_of(*wanted) for wanted in OVERVIEWS]}
    lines = json.dumps(found).replace('}, {"step"', '},\n{"step"').replace(']}, "', ']},\n"')
    STORED.write_text(lines + "\n")
    TEXT.write_text(render_overview(found["overviews"][0]) + "\n")
