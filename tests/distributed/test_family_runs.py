"""Invariants 1 and 7 for Llama, Mistral and Qwen: transformers computes the same, dense and at 75%,
and so do all layouts and both engines while they train."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import train
from curves import close
from family_cases import plain, trained
from harness import world_of
from mup import MUP
from transformers import AutoModelForCausalLM

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

STEPS, GREEDY = 20, 6
TOLERANCE = 1e-4  # of logits with a spread near 1: some hundred roundings of fp32
LONG = 8448  # over the 8192 tokens of Llama 3.1's original length
IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(3))
LEVELS = [0.0, 0.75]
LAYOUTS = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "tp4": {"parallel": {"tensor": 4}},  # over two query groups
    "tp4 sp": {"parallel": {"tensor": 4, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "dp2": {"parallel": {"data": 2}},
    "tp2 sp recomputed": {"parallel": {"tensor": 2, "sequence": True},
                          "train": {"recompute": "full"}},
    "deepspeed tp2": {"engine": "deepspeed", "parallel": {"tensor": 2}},
    "deepspeed tp2 sp": {"engine": "deepspeed", "parallel": {"tensor": 2, "sequence": True,
                                                             "zero_stage": 2}},
    "deepspeed zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}},
}
TRAINED = ["llama", "qwen2", "qwen3"]
# What each family has of its own, at least once; LAYOUTS=all for all of all.
RUNS = [("qwen3", 0.75, layout) for layout in ("tp2", "tp2 sp", "tp4", "pp2", "dp2",
                                               "deepspeed tp2 sp")]
RUNS += [("qwen2", 0.75, "tp4 sp"), ("llama", 0.75, "tp2 sp recomputed"),
         ("llama", 0.75, "deepspeed zero 3"), ("qwen3", 0.0, "deepspeed tp2"),
         ("qwen2", 0.0, "pp2")]
if os.environ.get("LAYOUTS") == "all":
    RUNS = [(family, level, layout) for family in TRAINED for level in LEVELS
            for layout in LAYOUTS]
# Of the other families, and of these dense, the logits at least.
COMPUTED = [run for run in RUNS if not run[2].startswith("deepspeed")]
COMPUTED += [("mistral", 0.75, "tp4"), ("mistral", 0.0, "tp2"), ("tied llama", 0.75, "pp2"),
             ("tied qwen3", 0.0, "tp4"), ("untied qwen2", 0.0, "tp2"), ("llama", 0.0, "pp2")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def begun(place, corpus, make_recipe):
    """A run from a model of transformers at a level of sparsity, cut for four ranks where the
    family can be: its recipe."""
    @cache
    def begin(family: str, level: float, **changes) -> dict:
        given = place / " ".join([family, *map(str, changes.values())])
        if not given.exists():
            save_family(family, given, **changes)
        source = open_weights(given)
        slices = max(source.model.possible_slices())
        recipe = make_recipe(f"{given} {level:.0%}", sparsity=level,
                             model=source.model.model_dump() | {"slices": slices},
                             train={"micro_batch": 4})
        source = open_weights(given, like=Recipe.model_validate(recipe).model)
        write_initial_checkpoint(source, Recipe.model_validate(recipe),
                                 load_tokenizer(f"{corpus}.tokenizer"), Path(recipe["output"]))
        return recipe
    return begin


@pytest.fixture(scope="module")
def run(ranks, begun):
    """What the last rank gives of a run at a layout."""
    def at(family: str, level: float, layout: str | None = None) -> dict:
        recipe = begun(family, level)
        for section, change in (LAYOUTS[layout] if layout else {}).items():
            recipe = recipe | {section: recipe.get(section, {}) | change
                               if isinstance(change, dict) else change}
        steps = STEPS if layout is None or (family, level, layout) in RUNS else 0
        one_by_one = not recipe.get("parallel", {}).get("sequence")  # which wants even lengths
        return ranks(world_of(recipe)).run_all(trained, recipe, steps * (family in TRAINED), IDS,
                                               GREEDY * one_by_one)[-1]
    return at


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


@pytest.mark.parametrize(("family", "level", "layout"), COMPUTED)
def test_transformers_computes_the_same_logits_and_text_at_every_layout(run, exported, family,
                                                                        level, layout):
    there, directory = run(family, level, layout), exported(family, level)
    assert float((there["logits"] - logits_of(directory, IDS)).abs().max()) < TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(directory)
    half = IDS[:1, : IDS.size(1) // 2]
    text = model.generate(half, do_sample=False, eos_token_id=None, max_new_tokens=GREEDY)
    assert text[0, : there["text"].size(1)].tolist() == there["text"][0].tolist()


def test_scaled_positions_beyond_the_original_length(ranks, begun, place):
    ids = torch.randint(0, 300, (1, LONG), generator=torch.Generator().manual_seed(3))
    shape = {"num_hidden_layers": 1, "max_position_embeddings": LONG}
    recipe = begun("llama", 0.0, **shape)
    scaled = logits_of(Path(recipe["output"].removesuffix(" 0%")), ids)
    assert float((ranks(1).run(trained, recipe, 0, ids)["logits"] - scaled).abs().max()) < TOLERANCE
    plain = save_family("llama", place / "plain", rope_parameters={"rope_theta": 5e5}, **shape)
    apart = (logits_of(plain, ids) - scaled).abs().amax((0, 2))
    assert float(apart[8192:].max()) > 100 * TOLERANCE


KINDS = {"tiles": {"level": 0.5, "pattern": "tile", "tile": 4},
         "2:4": {"level": 0.5, "pattern": "2:4"},
         "rigl": {"level": 0.75, "algorithm": "rigl",
                  "update": {"every": 2, "fraction": 0.3, "stop": 0.75}}}


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_and_moving_masks(ranks, begun, kind):
    """On slices of gates and ups, over query groups."""
    recipe = begun("qwen3", 0.75) | {"sparsity": KINDS[kind], "output": None}
    one = ranks(1).run(train, recipe, 6)
    close(ranks(4).run(train, recipe | {"parallel": {"tensor": 4}}, 6)["curve"], one["curve"])
    assert one["sparsity"] == pytest.approx(one["planned"], abs=1e-12)


@pytest.mark.parametrize("family", ["qwen3", "tied llama"])
def test_mup_is_folded_into_what_transformers_has(ranks, begun, place, family):
    """The multiplier of Q K^T into the norms of queries, where there are such."""
    recipe = begun(family, 0.75) | MUP | {"output": str(place / f"{family} mup")}
    source = open_weights(place / family, like=Recipe.model_validate(recipe).model)
    tokenizer = load_tokenizer(f"{recipe['data']['train'][0]}.tokenizer")
    write_initial_checkpoint(source, Recipe.model_validate(recipe), tokenizer,
                             Path(recipe["output"]))
    ours = ranks(1).run(trained, recipe, 1, IDS)["logits"]
    export(CheckpointReader(find_checkpoint(Path(recipe["output"]))), place / f"{family} mup out")
    theirs = logits_of(place / f"{family} mup out", IDS)
    assert float((ours - theirs).abs().max()) < TOLERANCE


@pytest.mark.parametrize(("family", "level", "layout"), RUNS)
def test_losses_are_the_same_at_every_layout(run, family, level, layout):
    there = run(family, level, layout)
    close(there["curve"], run(family, level)["curve"])


def test_interleaved_stages(ranks, make_deep_recipe):
    """With a head of its own, norms by head, and layers computed again."""
    recipe = make_deep_recipe(model={"architecture": "qwen3", "head_width": 32, "query_groups": 2,
                                     "ffn_hidden": 96})
    there = recipe | {"parallel": {"pipeline": 2, "interleave": 2},
                      "train": recipe["train"] | {"recompute": "full"}}
    close(ranks(2).run(train, there, 4)["curve"], ranks(1).run(train, recipe, 4)["curve"])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", TRAINED)
def test_plain_pytorch_trains_the_same(ranks, begun, run, exported, family, level):
    """With transformers' model and masks multiplied into its weights."""
    recipe = begun(family, level) | {"output": None}
    close(run(family, level)["curve"],
          ranks(1).run(plain, recipe, STEPS, str(exported(family, level))))
