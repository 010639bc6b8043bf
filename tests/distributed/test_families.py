"""Invariants 1 and 7 for Llama, Mistral and Qwen: transformers computes the same, dense and at 75%,
and so do all layouts and both engines while they train."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from curves import close
from family_cases import plain, trained
from harness import world_of

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_export import export
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer
from megatron_spdf.recipe.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import FAMILIES, save_family  # noqa: E402
from huggingface_models import logits_of  # noqa: E402

pytestmark = pytest.mark.slow

STEPS = 20
TOLERANCE = 1e-4  # of logits with a spread near 1: some hundred roundings of fp32
IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(3))
LEVELS = [0.0, 0.75]
LAYOUTS = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "tp4": {"parallel": {"tensor": 4}},  # over two query groups
    "tp4 sp": {"parallel": {"tensor": 4, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2 interleaved": {"model": {"layers": 4}, "parallel": {"pipeline": 2, "interleave": 2},
                        "train": {"micro_batch": 2}},
    "dp2": {"parallel": {"data": 2}},
    "tp2 sp recomputed": {"parallel": {"tensor": 2, "sequence": True},
                          "train": {"recompute": "full"}},
    "deepspeed tp2": {"engine": "deepspeed", "parallel": {"tensor": 2}},
    "deepspeed tp2 sp": {"engine": "deepspeed", "parallel": {"tensor": 2, "sequence": True,
                                                             "zero_stage": 2}},
    "deepspeed zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}},
}
# Each way of each family's own at least once.
RUNS = [("qwen3", 0.75, layout) for layout in LAYOUTS if layout != "pp2 interleaved"]
RUNS += [("qwen2", 0.75, "tp2 sp"), ("qwen2", 0.75, "tp4"), ("llama", 0.75, "tp4"),
         ("llama", 0.75, "deepspeed tp2 sp"), ("tied qwen3", 0.0, "deepspeed tp2"),
         ("qwen3", 0.0, "tp4"), ("qwen2", 0.0, "pp2")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def begun(place, corpus, make_recipe):
    """A run from a model of transformers at a level of sparsity, cut for four ranks where the
    family can be: its recipe."""
    @cache
    def begin(family: str, level: float) -> dict:
        if not (place / family).exists():
            save_family(family, place / family)
        source = open_weights(place / family)
        slices = max(source.model.possible_slices())
        recipe = make_recipe(str(place / f"{family} {level:.0%}"), sparsity=level,
                             model=source.model.model_dump() | {"slices": slices},
                             train={"micro_batch": 4})
        source = open_weights(place / family, like=Recipe.model_validate(recipe).model)
        write_initial_checkpoint(source, Recipe.model_validate(recipe),
                                 load_tokenizer(f"{corpus}.tokenizer"), Path(recipe["output"]))
        return recipe
    return begin


@pytest.fixture(scope="module")
def run(ranks, begun):
    """What the last rank gives of a run at a layout."""
    def train(family: str, level: float, layout: str | None = None) -> dict:
        recipe = begun(family, level)
        for section, change in (LAYOUTS[layout] if layout else {}).items():
            recipe = recipe | {section: recipe.get(section, {}) | change
                               if isinstance(change, dict) else change}
        return ranks(world_of(recipe)).run_all(trained, recipe, STEPS, IDS)[-1]
    return train


@pytest.fixture(scope="module")
def exported(begun):
    """The run's step 0 as a directory of transformers."""
    @cache
    def of(family: str, level: float) -> Path:
        run = Path(begun(family, level)["output"])
        output = run.with_name(f"{run.name} exported")
        export(CheckpointReader(find_checkpoint(run)), output)
        return output
    return of


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(run, exported, place, family, level):
    ours = run(family, level)["logits"]
    theirs = logits_of(exported(family, level), IDS)
    assert float(theirs.std()) > 0.1
    assert float((ours - theirs).abs().max()) < TOLERANCE
    apart = float((logits_of(place / family, IDS) - theirs).abs().max())
    assert (apart > 0.1) if level else apart == 0.0  # as it came


@pytest.mark.parametrize(("family", "level", "layout"), RUNS)
def test_losses_are_the_same_at_every_layout(run, family, level, layout):
    there = run(family, level, layout)
    close(there["curve"], run(family, level)["curve"])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_plain_pytorch_trains_the_same(ranks, begun, run, exported, family, level):
    """With transformers' model and masks multiplied into its weights."""
    recipe = begun(family, level) | {"output": None}
    close(run(family, level)["curve"],
          ranks(1).run(plain, recipe, STEPS, str(exported(family, level))))
