"""Weights that are selected layer by layer are those of a whole model in memory, transformers' with
NumPy; the run goes on at any layout and with any algorithm."""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import one_shot_reference as reference
import pytest
import torch
from cases import converted
from curves import close
from one_shot_cases import Given, begun, diverged
from stage_cases import staged
from torch.nn.functional import cross_entropy

from megatron_spdf.checkpoint.inspect import verify
from megatron_spdf.checkpoint.reader import (
    TRAINED_BITS,
    CheckpointReader,
    find_checkpoint,
    stored_name,
)
from megatron_spdf.convert.huggingface_export import in_memory
from megatron_spdf.data.indexed.tokens import IndexedTokens
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.sparsity.selectors.base import largest_masks
from megatron_spdf.sparsity.slices import slice_of

sys.path.insert(0, str(Path(__file__).parents[1] / "seams"))
import toy_decoder  # noqa: E402

PLUGINS = toy_decoder.__name__
pytestmark = pytest.mark.slow

SAMPLES, LENGTH, STEPS = 12, 24, 3
IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(3))
FAMILIES = {"gpt": {}, "toy": {"architecture": "toy", "query_groups": 2, "ffn_hidden": 96,
                               "norm_eps": 1e-5}}


@pytest.fixture(scope="module")
def make(make_recipe, tmp_path_factory):
    """A recipe at 50%, with a new directory; sections changed by keyword."""
    def make(family: str = "gpt", **sections) -> dict:
        return make_recipe(str(tmp_path_factory.mktemp("begun") / "run"),
                           **{"sparsity": 0.5, **sections},
                           model=FAMILIES[family] | sections.get("model", {}))
    return make


@pytest.fixture(scope="module")
def run(ranks, make, corpus):
    """A recipe whose run begins with selected weights, and losses before and after."""
    @cache
    def run(select: str, family: str = "gpt") -> tuple[dict, dict[str, float]]:
        recipe = make(family)
        return recipe, ranks(1).run(begun, recipe, select, asked(corpus))
    return run


def asked(corpus: str) -> dict:
    """Of `Calibration`."""
    return {"calibrate": corpus, "samples": SAMPLES, "length": LENGTH}


def windows(corpus: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Text to calibrate with, and held-out text: (sequences, LENGTH + 1) each."""
    tokens = IndexedTokens(corpus)
    count = (tokens.tokens - 1) // LENGTH
    free = count - count // 10
    return tuple(torch.from_numpy(np.stack([
        tokens.read((first + i * some // SAMPLES) * LENGTH, LENGTH + 1).astype(np.int64)
        for i in range(SAMPLES)])) for first, some in ((0, free), (free, count - free)))


def loss_of(model, text: torch.Tensor) -> float:
    logits = model(text[:, :-1]).logits
    return float(cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()))


def matrix_of_rows(model, name: str) -> np.ndarray | None:
    """By query group its queries, its key and its value; by slice its gates and its ups."""
    if ".linear_qkv." in name:
        heads = [0] * (model.heads // model.query_groups) + [1, 2]
        return np.tile(np.repeat(heads, model.head_width), model.query_groups)
    if ".linear_fc1." in name and model.gated:
        return np.tile(np.repeat([0, 1], model.ffn_hidden // model.slices), model.slices)
    return None


def inputs_of(model, modules: dict, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Inputs (tokens, in) of modules of a model, by name."""
    found: dict[str, np.ndarray] = {}
    hooks = [module.register_forward_pre_hook(
        lambda _, given, name=name: found.update({name: given[0].flatten(0, 1).double().numpy()}))
             for name, module in modules.items()]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def whole_model(recipe: dict, corpus: str, select: str) -> tuple[dict, dict, dict[str, float]]:
    """Prunes transformers' model in place, each layer by inputs that hooks on the whole see.

    Returns:
        Values and masks of the weights, and losses before and after.
    """
    source, plan = Given(recipe), Plan.of(Recipe.model_validate(recipe))
    model = in_memory(source)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    calibration, held_out = windows(corpus)
    losses, values, masks = {"dense": loss_of(model, held_out)}, {}, {}
    for layer in range(source.model.layers):
        here = [w for w in source.weights.values() if w.linear and w.layer == layer]
        forms = {w.name: source.model.huggingface_form(w) for w in here}
        inputs = inputs_of(model, {name: modules[form.names[0].removesuffix(".weight")]
                                   for name, form in forms.items()}, calibration[:, :-1])
        for name, form in forms.items():
            dense = form.join([parameters[there] for there in form.names]).double().numpy()
            if select == "wanda":
                found = reference.wanda(plan.weights[name], dense, inputs[name])
            else:
                found = reference.brain_surgery(
                    plan.weights[name], dense, reference.dampened(inputs[name]),
                    matrices=matrix_of_rows(source.model, name))
            values[name], masks[name] = found
            for there, part in zip(form.names, form.split(torch.from_numpy(found[0]).float()),
                                   strict=True):
                parameters[there].copy_(part)
    return values, masks, losses | {"pruned": loss_of(model, held_out)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("select", ["wanda", "sparsegpt"])
def test_layer_by_layer_is_as_the_whole_model_in_memory(run, corpus, select, family):
    recipe, losses = run(select, family)
    reader = CheckpointReader(find_checkpoint(Path(recipe["output"])), checksums=True)
    values, masks, expected = whole_model(recipe, corpus, select)
    assert losses == pytest.approx(expected, abs=1e-3)
    assert set(values) == set(reader.plan.weights)
    for name, mask in masks.items():
        found = reader.parameter(name).numpy()
        other = (found != 0) != mask
        assert other.mean() <= 1e-3, name  # near ties, in float32 and float64
        alike = ~other.any(1)  # one death changes what is to the right of it
        np.testing.assert_allclose(found[alike], values[name][alike], atol=1e-3, err_msg=name)
    assert "masks are as planned" in verify(reader)
    assert reader.masks["kind"] == "stored"
    assert reader.masks["how"].endswith(
        f"of given weights, with {SAMPLES} sequences of {LENGTH} tokens of text")


def test_text_to_evaluate_is_read_in_place_of_the_held_out(ranks, make, corpus):
    """And magnitudes are chosen with it as without it."""
    recipes = [make(), make()]
    other = {"evaluate": corpus, "samples": SAMPLES, "length": LENGTH}
    losses = [ranks(1).run(begun, recipe, "magnitude", text)
              for recipe, text in zip(recipes, (None, other), strict=True)]
    assert losses[0] == {}
    tokens = IndexedTokens(corpus)
    count = (tokens.tokens - 1) // LENGTH
    text = torch.from_numpy(np.stack([
        tokens.read(i * count // SAMPLES * LENGTH, LENGTH + 1).astype(np.int64)
        for i in range(SAMPLES)]))
    with torch.no_grad():
        assert losses[1]["dense"] == pytest.approx(loss_of(in_memory(Given(recipes[1])), text),
                                                   abs=1e-4)
    one, other = (CheckpointReader(find_checkpoint(Path(recipe["output"]))) for recipe in recipes)
    for name in one.weights:
        assert torch.equal(one.parameter(name), other.parameter(name)), name


def test_a_model_that_has_diverged_is_refused(ranks, make, corpus):
    recipe = make()
    assert "layer 1 gives numbers on the text that are not finite" in ranks(1).run(
        diverged, recipe, asked(corpus))
    assert not Path(recipe["output"]).exists()


def test_the_run_computes_and_goes_on_at_any_layout(ranks, make, corpus):
    recipe, other = at_two_layouts(ranks, make, corpus)
    with torch.no_grad():
        expected = in_memory(CheckpointReader(find_checkpoint(Path(recipe["output"]))))(IDS).logits
    two, one = (ranks(world).run(converted, there, STEPS, IDS)
                for world, there in ((2, recipe), (1, other)))
    assert torch.allclose(one["before"], expected, atol=1e-4)
    assert torch.allclose(two["before"], expected, atol=1e-4)
    close(two["curve"], one["curve"])


def test_an_algorithm_moves_the_masks_from_there(ranks, make, corpus):
    """Of each slice as many at any layout."""
    moving = {"level": 0.5, "algorithm": "rigl", "update": {"every": 1, "stop": 1.0}}
    recipe, other = at_two_layouts(ranks, make, corpus, sparsity=moving, log={"every": 1})
    first = CheckpointReader(find_checkpoint(Path(recipe["output"])))
    begins = {name: first.mask_bits(name) for name in first.plan.weights}
    two, one = (ranks(world).run(staged, [there], [STEPS])["records"]
                for world, there in ((2, recipe), (1, other)))
    losses = [[r["loss"] for r in there if r["kind"] == "train"] for there in (two, one)]
    # near ties among gradients may go either way
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == STEPS
    reader = CheckpointReader(find_checkpoint(Path(recipe["output"])), checksums=True)
    assert reader.run["state"]["mask_updates"] == STEPS
    for name, bits in begins.items():
        after = reader.mask_bits(name)
        assert not np.array_equal(after, bits)
        assert np.array_equal(*(np.unpackbits(b, axis=1).sum(1) for b in (after, bits)))


ALGORITHMS = {
    "ste": {"algorithm": "ste"},
    "top_kast": {"algorithm": "top_kast", "update": {"every": 2}},
    # of a level of 2/3, 3/4 of which is one half
    "gmp": {"level": 2 / 3, "algorithm": "gmp", "update": {"initial": 0.75, "start": 0.25,
                                                           "stop": 0.5, "every": 1, "stores": 1}},
    "acdc": {"algorithm": "acdc", "update": {"start": 0.0, "turn": 0.25, "last_dense": 0.5}},
}


@pytest.mark.parametrize("select", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_of_any_algorithm_begins_with_what_was_selected(ranks, make, run, corpus, name,
                                                              select):
    """With the masks and the weights of a run whose masks stay, and the same loss."""
    static, losses = run(select)
    recipe = make(sparsity={"level": 0.5, **ALGORITHMS[name]}, train={"tokens": 8 * 32 * 8},
                  optimizer={"warmup_tokens": 256}, log={"every": 1},
                  checkpoint={"asynchronous": False})
    assert ranks(1).run(begun, recipe, select, asked(corpus)) == losses
    there, begins = (CheckpointReader(find_checkpoint(Path(r["output"]))) for r in (static, recipe))
    assert begins.masks["how"] == there.masks["how"] and "masks are as planned" in verify(begins)
    for weight, planned in begins.plan.weights.items():
        assert np.array_equal(begins.mask_bits(weight), there.mask_bits(weight)), weight
        assert torch.equal(begins.parameter(weight), there.parameter(weight)), weight
        if planned.algorithm.keeps:  # what it chooses next is what was selected
            entries = begins.entries(weight, "param")
            assert np.array_equal(largest_masks(entries, planned), np.unpackbits(
                there.mask_bits(weight), axis=1, count=planned.numel // planned.slices)), weight
    if select == "wanda":  # all others are trained on alike
        records = ranks(1).run(staged, [recipe], [None])["records"]
        assert len([r for r in records if r["kind"] == "train"]) == 8
        CheckpointReader(find_checkpoint(Path(recipe["output"])), checksums=True)


def test_what_learns_beside_the_selected_is_next_in_magnitude(ranks, make, corpus):
    """Of Top-KAST, from the first step on, and not all entries until masks are chosen again."""
    recipe = make(sparsity={"level": 0.75, **ALGORITHMS["top_kast"]})
    ranks(1).run(begun, recipe, "magnitude", None)
    reader = CheckpointReader(find_checkpoint(Path(recipe["output"])))
    for name, planned in reader.plan.weights.items():
        learn = np.unpackbits(reader.tensor(stored_name(name) + TRAINED_BITS).numpy(), axis=1)
        entries = reader.entries(name, "param")
        for number, found in enumerate(learn):
            part = slice_of(entries, planned, number).abs().numpy()
            order = np.argsort(-part, kind="stable")[: 2 * planned.active_per_slice]
            assert set(np.flatnonzero(found)) == set(order), name


def at_two_layouts(ranks, make, corpus: str, **sections) -> tuple[dict, dict]:
    """Recipes of one run that begins with selected weights, for two tensor-parallel ranks and for
    one."""
    recipe = make(**sections, parallel={"tensor": 2})
    ranks(1).run(begun, recipe, "sparsegpt", asked(corpus))
    alone = recipe | {"output": recipe["output"] + " alone", "parallel": {"tensor": 1}}
    shutil.copytree(recipe["output"], alone["output"])
    return recipe, alone
