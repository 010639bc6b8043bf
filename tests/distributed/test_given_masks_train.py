"""A model with masks of another tool, of unequal counts in its slices, trains like transformers'
with its zeros held, at every layout and on both engines, and is exported with the same zeros."""

import sys
from pathlib import Path

import pytest
import torch
from cases import converted
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
from families import make_family  # noqa: E402

pytestmark = pytest.mark.slow

STEPS = 4
IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(3))
LAYOUTS = {"one": {}, "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
           "deepspeed zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}}}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A Qwen2 pruned by magnitude over whole matrices, each to a level of its own."""
    model = make_family("qwen2")
    with torch.no_grad():
        for number, (name, values) in enumerate(model.named_parameters()):
            if values.ndim == 2 and ".layers." in name:
                count = round((0.3 + 0.05 * (number % 8)) * values.numel())
                values.view(-1)[values.abs().flatten().argsort()[:count]] = 0.0
    directory = tmp_path_factory.mktemp("theirs") / "qwen2"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def begin(theirs, corpus, make_recipe, tmp_path):
    """Makes a run of it: its recipe, for a layout."""
    def begin(**sections) -> dict:
        model = open_weights(theirs).model.model_dump() | {"slices": 2}
        values = make_recipe(str(tmp_path / "run"), sparsity=0, model=model)
        recipe = Recipe.model_validate(values)
        write_initial_checkpoint(open_weights(theirs, like=recipe.model), recipe,
                                 load_tokenizer(f"{corpus}.tokenizer"), tmp_path / "run", "nonzero")
        made = CheckpointReader(find_checkpoint(tmp_path / "run")).recipe
        assert made.sparsity.algorithm == "imported"
        return values | {"sparsity": made.sparsity.model_dump()} | sections
    return begin


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_transformers_with_zeros_held(ranks, theirs, make_recipe, begin, layout):
    model = open_weights(theirs).model.model_dump()
    dense = make_recipe(sparsity=0, model=model | {"slices": 2})
    expected = ranks(1).run(plain, dense, STEPS, str(theirs))
    recipe = begin(**LAYOUTS[layout])
    close(ranks(world_of(recipe)).run(trained, recipe, STEPS, IDS)["curve"], expected)


def test_zeros_stay_where_they_were_also_at_another_layout(ranks, theirs, begin, tmp_path):
    """Two steps at one rank, two at two, then an export."""
    recipe = begin()
    ranks(1).run(converted, recipe, 2, IDS)
    ranks(2).run(converted, recipe | LAYOUTS["tp2 sp"], 4, IDS)
    reader = CheckpointReader(find_checkpoint(tmp_path / "run", newest=True))
    assert reader.run["state"]["step"] == 4
    export(reader, tmp_path / "ours")
    before, after = (open_weights(path) for path in (theirs, tmp_path / "ours"))
    for name in reader.plan.weights:
        assert torch.equal(before.weight(name) == 0, after.weight(name) == 0), name
        assert not torch.equal(before.weight(name), after.weight(name))
