"""What a start takes from a checkpoint and what it refuses, and a last save that is tried again."""

from __future__ import annotations

import json
import os
import pickle
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import bench, ending, masks

from megatron_spdf.checkpoint import store
from megatron_spdf.convert.initial_checkpoint import finish_run, write_initial_checkpoint
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import SparseWeight

pytestmark = pytest.mark.slow

STEPS = 2
ENGINES = {"megatron": {"parallel": {"data": 2}},
           **{f"zero {stage}": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": stage}}
              for stage in (1, 3)}}
MOVED = "decoder.layers.1.mlp.linear_fc1.weight"


class Given:
    """Random weights of a recipe's model, as a source of a run."""

    path, tokenizer, origin = Path("given"), None, "given weights"

    def __init__(self, recipe: Recipe):
        self.model, draw = recipe.model, torch.Generator().manual_seed(3)
        self.weights = {weight.name: weight for weight in self.model.weights()}
        self.values = {name: torch.randn(weight.shape, generator=draw) / 4
                       for name, weight in self.weights.items()}

    def weight(self, name: str) -> torch.Tensor:
        return self.values[name]

    master = weight


@pytest.fixture(scope="module")
def begin(make_recipe, corpus, tmp_path_factory):
    """Makes a run of given weights; returns its recipe's values."""
    def begin(select: str = "random", **sections) -> dict:
        recipe = make_recipe(str(tmp_path_factory.mktemp("begun") / "run"), **sections)
        write_initial_checkpoint(Given(made := Recipe.model_validate(recipe)), made,
                                 load_tokenizer(f"{corpus}.tokenizer"), Path(recipe["output"]),
                                 select)
        return recipe
    return begin


def first_checkpoint(recipe: dict) -> Path:
    return Path(recipe["output"]) / "checkpoints" / store.name_of(0)


def write_into(recipe: dict, name: str, content: bytes) -> None:
    """Changes a file of a run's first checkpoint, and the list of its files."""
    checkpoint = first_checkpoint(recipe)
    (checkpoint / store.FILES).unlink()
    (checkpoint / name).write_bytes(content)
    finish_run(checkpoint, Recipe.model_validate(recipe))


def one_entry_moved(begin) -> dict:
    """A run whose masks are said to be drawn, and of which one has an active entry elsewhere."""
    draw = SparseWeight.draw

    def moved(weight: SparseWeight, seed: int, slice_id: int):
        mask = draw(weight, seed, slice_id)
        if weight.name == MOVED and slice_id == 1:
            mask[[mask.argmax(), mask.argmin()]] = False, True
        return mask

    with patch.object(SparseWeight, "draw", moved):
        return begin(parallel={"data": 2})


def code_in_the_index(begin, ran: Path) -> dict:
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    recipe = begin(parallel={"data": 2})
    write_into(recipe, ".metadata", pickle.dumps(Code()))
    return recipe


def restored(recipe: dict) -> dict | str:
    """Masks of a restored run and the steps that follow, or why it is refused."""
    with bench(recipe) as b:
        try:
            state, _ = b.checkpointer.restore(b.engine)
        except ValueError as error:
            return str(error)
        return {"masks": masks(b.engine), "valid": [
            b.engine.evaluate(batch, False)[0] for batch in b.data.validation_batches()],
            "curve": b.steps(state.step, STEPS)}


def ends_on_a_full_disk(recipe: dict, failures: int) -> dict:
    """A run whose saves of the last step fail so many times: how it ends, and what is there."""
    complete, failed = store.complete, []

    def no_space(partial: Path, files: dict) -> Path:
        if partial.name.startswith(store.name_of(b.recipe.steps)) and len(failed) < failures:
            failed.append(partial.name)
            raise OSError("no space left")
        return complete(partial, files)

    with bench(recipe) as b, patch.object(store, "complete", no_space):
        try:
            end = ending(b)
        except OSError as error:
            end = str(error)
        return {"end": end, "failed": len(failed),
                "saved": [p.name for p in store.visible(b.run.checkpoints)]}


@pytest.fixture(scope="module")
def start(ranks, begin):
    """Of a run that begins with such masks, what each rank of an engine gives."""
    begun = cache(lambda kind, select: begin(select, **ENGINES[kind]))
    return lambda kind, select: ranks(2).run(restored, begun(kind, select))


@pytest.mark.parametrize("kind", [kind for kind in ENGINES if kind != "megatron"])
def test_given_masks_are_taken_by_every_engine(start, kind):
    drawn, theirs = (start("megatron", select) for select in ("random", "magnitude"))
    ours = start(kind, "magnitude")
    assert ours["masks"] == theirs["masks"] and len(theirs["masks"]) == 8 * 4
    assert not set(theirs["masks"].items()) & set(drawn["masks"].items())
    assert ours["valid"] == pytest.approx(theirs["valid"], rel=1e-5)
    for found, expected in zip(ours["curve"], theirs["curve"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert theirs["valid"] != pytest.approx(drawn["valid"], rel=1e-3)


def test_a_seeded_mask_that_is_another_is_refused(ranks, begin):
    for said in ranks(2).run_all(restored, one_entry_moved(begin)):
        assert f"holds another mask of {MOVED} than the recipe draws" in said


@pytest.mark.parametrize(("change", "said"), [
    ({"seed": 8}, "seed is 7 there and 8 here"),
    ({"train": {"tokens": 8 * 32 * 70}}, "train.tokens is 15360 there and 17920 here"),
    ({}, "tokenizer is 00 there and ")], ids=["seed", "tokens", "tokenizer"])
def test_a_checkpoint_of_another_run_is_refused(ranks, begin, make_recipe, change, said):
    recipe = begin(parallel={"data": 2})
    if not change:
        run = json.loads((first_checkpoint(recipe) / store.RUN).read_text())
        run["tokenizer"]["sha256"] = "00"
        write_into(recipe, store.RUN, json.dumps(run).encode())
    other = make_recipe(recipe["output"], parallel={"data": 2}, **change)
    for found in ranks(2).run_all(restored, other):
        assert "is of another run: " in found and said in found


def test_code_in_the_index_is_refused_and_does_not_run(ranks, begin, tmp_path):
    for said in ranks(2).run_all(restored, code_in_the_index(begin, tmp_path / "ran")):
        assert ".metadata is not the index of a checkpoint" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("failures", "end", "failed", "saved"), [
    (1, "exit code 0", 1, [2, 4]), (9, "saves failed", 2, [2])])
def test_a_last_save_that_failed_is_tried_once_more(ranks, make_recipe, failures, end, failed,
                                                    saved):
    recipe = make_recipe(parallel={"data": 2}, train={"tokens": 8 * 32 * 4, "micro_batch": 4},
                         optimizer={"warmup_tokens": 256}, checkpoint={"every": 2, "keep": 9})
    found = ranks(2).run(ends_on_a_full_disk, recipe, failures)
    assert end in found["end"] and found["failed"] == failed
    assert found["saved"] == [store.name_of(step) for step in saved]
