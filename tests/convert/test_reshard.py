"""The same checkpoint with its files cut for another layout."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_models import make_recipe

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.inspect import verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.reshard import branch, check_layout, reshard
from megatron_spdf.convert.source import open_weights
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Parallel, Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.schedule.stages import stages_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import convert_checkpoint  # noqa: E402


@pytest.fixture
def reader(gpt2, tokenizer, tmp_path):
    write_initial_checkpoint(open_weights(gpt2), make_recipe(sparsity=0.5, parallel={"tensor": 3}),
                             tokenizer, tmp_path / "run",
              "magnitude")
    return CheckpointReader(find_checkpoint(tmp_path / "run"))


def test_every_tensor_and_the_state_of_the_run_are_the_same(reader, tmp_path):
    layout = Parallel(pipeline=2, data=2)
    checkpoint = reshard(reader, layout, tmp_path / "other")
    other = CheckpointReader(checkpoint, checksums=True)
    assert other.recipe.parallel == layout and load_recipe(tmp_path / "other"
                                                           / "recipe.yaml").parallel == layout
    assert other.recipe.identity() == reader.recipe.identity()
    assert other.shapes == reader.shapes and other.dtypes == reader.dtypes
    assert all(torch.equal(other.tensor(name), reader.tensor(name)) for name in reader.shapes)
    kept = {key: value for key, value in reader.run.items() if key != "recipe"}
    assert kept.items() <= other.run.items() and other.tokenizer.sha256 == reader.tokenizer.sha256
    assert "8 masks" in verify(other)
    assert sorted(p.name for p in checkpoint.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]


@pytest.mark.parametrize("layout, message", [
    ({"tensor": 4}, r"query_groups=6 .* not divisible by parallel.tensor=4; .*nearest layout that "
                    r"the model allows is "
                    "parallel.tensor=3 parallel.pipeline=1 parallel.interleave=1 parallel.data=1 "),
    ({"pipeline": 3}, "layers=2 is not divisible by .* = 3; .*nearest .* parallel.tensor=1 "
                      "parallel.pipeline=2 "),
    ({"pipeline": 2, "interleave": 3},
     "nearest .* parallel.pipeline=1 parallel.interleave=1|parallel.pipeline=2 "
                                       "parallel.interleave=1"),
    ({"tensor": 5, "data": 3, "sequence": True},
     "nearest .* parallel.tensor=3 .* parallel.data=2|parallel.data=4"),
])
def test_an_impossible_layout_is_refused_with_the_nearest(reader, tmp_path, layout, message):
    with pytest.raises(ValueError, match=message):
        reshard(reader, Parallel(**layout), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_nearest_layout_is_one(reader):
    with pytest.raises(ValueError) as refused:
        check_layout(make_recipe(parallel={"tensor": 7, "pipeline": 7, "interleave": 7, "data": 7,
                                           "sequence": True}))
    words = dict(word.removeprefix("parallel.").split("=") for word in str(refused.value).split() if
                 word.startswith("parallel.") and "=" in word)
    layout = {key: words[key] for key in ("tensor", "pipeline", "interleave", "data", "sequence")}
    check_layout(make_recipe(parallel=layout))


def test_a_missing_tensor_is_named(reader, tmp_path):
    reader.shapes.pop("decoder.final_layernorm.bias")
    with pytest.raises(store.DamagedCheckpoint, match="decoder.final_layernorm.bias is missing"):
        reshard(reader, Parallel(), tmp_path / "other")


def test_a_run_goes_on_from_its_newest_checkpoint_and_not_its_best(reader, tmp_path):
    run, checkpoints = tmp_path / "run", reader.path.parent
    shutil.copytree(reader.path, checkpoints / store.name_of(5))
    assert find_checkpoint(run).name == store.name_of(5)
    store.write_json(checkpoints / store.BEST, {"checkpoint": store.name_of(0)})
    assert find_checkpoint(run).name == store.name_of(0)
    assert find_checkpoint(run, newest=True).name == store.name_of(5)


@pytest.mark.parametrize(("command", "step"), [
    ("reshard", 5), ("branch", 5), ("prune", 0), ("densify", 0), ("to-megatron", 0)])
def test_what_goes_on_is_of_the_newest_and_what_begins_anew_of_the_best(
        reader, tmp_path, monkeypatch, command, step):
    checkpoints, opened = reader.path.parent, []
    shutil.copytree(reader.path, checkpoints / store.name_of(5))
    store.write_json(checkpoints / store.BEST, {"checkpoint": store.name_of(0)})

    def note(path, **_):
        opened.append(path.name)
        raise ValueError("that will do")

    monkeypatch.setattr(convert_checkpoint, "CheckpointReader", note)
    assert convert_checkpoint.main([command, str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert opened == [store.name_of(step)]


@pytest.mark.parametrize("wanted", [
    {"tensor": 4, "data": 3}, {"tensor": 5, "data": 3, "sequence": True}, {"pipeline": 3},
    {"pipeline": 2, "interleave": 3, "data": 2}, {"tensor": 6, "data": 8, "sequence": True}])
def test_the_nearest_layout_is_that_of_a_search(wanted):
    """By the sum of the logarithms of ratios, over all degrees up to nine."""
    recipe = make_recipe(model={"max_positions": 12}, parallel=wanted)
    p, layouts = recipe.parallel, {}
    for tensor, pipeline, interleave, data in itertools.product(range(1, 10), repeat=4):
        degrees = {"tensor": tensor, "pipeline": pipeline, "interleave": interleave, "data": data}
        layout = degrees | {"sequence": p.sequence and tensor > 1}
        other = recipe.model_copy(update={"parallel": p.model_copy(update=layout)})
        if not any(rule_violations(other)):
            distance = sum(abs(math.log(n / getattr(p, key))) for key, n in degrees.items())
            layouts.setdefault(round(distance, 9), []).append(layout)
    with pytest.raises(ValueError) as refused:
        check_layout(recipe)
    words = dict(word.removeprefix("parallel.").split("=")
                 for word in str(refused.value).rpartition("allows is ")[2].split())
    assert {key: json.loads(value) for key, value in words.items()} in layouts[min(layouts)]


def longer(reader, **sections):
    """The recipe of a run of ten times the tokens."""
    values = reader.recipe.without_stages().stored_at(1.0).model_dump()
    for name, change in {"train": {"tokens": 10_000}, "data": {"train": ["text"]},
                         **sections}.items():
        values[name] |= change
    return Recipe.model_validate(values)


def test_a_branch_has_the_tensors_the_state_and_what_lies_beside_the_checkpoints(reader, tmp_path):
    run, recipe = tmp_path / "run", longer(reader, log={"every": 3})
    reader.recipe = reader.recipe.model_copy(update={"data": recipe.data})
    (run / "log.jsonl").write_text("records\n")
    (run / "blend.json").write_text("[]")
    checkpoint = branch(reader, recipe, tmp_path / "other")
    other = CheckpointReader(checkpoint, checksums=True)
    assert all(torch.equal(other.tensor(name), reader.tensor(name)) for name in reader.shapes)
    assert other.run["state"] == reader.run["state"]
    assert other.recipe.train.tokens == load_recipe(tmp_path / "other/recipe.yaml").train.tokens
    assert other.recipe.train.tokens == 10_000
    assert (tmp_path / "other/log.jsonl").read_text() == "records\n"
    assert (tmp_path / "other/blend.json").read_text() == "[]"


def test_what_lies_beside_a_checkpoint_that_is_in_no_run_is_not_taken(reader, tmp_path):
    (tmp_path / "run/recipe.yaml").unlink()
    (tmp_path / "run/log.jsonl").write_text("a stranger's\n")
    reshard(reader, Parallel(), tmp_path / "other")
    assert not (tmp_path / "other/log.jsonl").exists()


def test_a_branch_of_a_dense_part_is_recorded_as_one(gpt2, tokenizer, tmp_path):
    gmp = {"level": 0.5, "algorithm": "gmp", "update": {"every": 1}}
    write_initial_checkpoint(open_weights(gpt2), make_recipe(sparsity=gmp,
                                                             data={"train": ["text"]}),
                             tokenizer, tmp_path / "run")
    reader = CheckpointReader(find_checkpoint(tmp_path / "run"))
    recipe = longer(reader)
    other = CheckpointReader(branch(reader, recipe, tmp_path / "other"))
    assert (other.recipe.sparsity.reached, other.plan.weights) == (0.0, {})
    assert load_recipe(tmp_path / "other/recipe.yaml").sparsity == recipe.sparsity


def test_a_branch_at_the_end_of_a_part_belongs_to_that_part(gpt2, tokenizer, tmp_path):
    gmp, constant = {"level": 0.5, "algorithm": "gmp"}, {"decay": "constant"}
    begun = make_recipe(sparsity={**gmp, "update": {"every": 1}}, data={"train": ["text"]},
                        train={"tokens": 10_000}, optimizer=constant)
    write_initial_checkpoint(open_weights(gpt2), begun, tokenizer, tmp_path / "run")
    reader = CheckpointReader(find_checkpoint(tmp_path / "run"))
    reader.run["state"]["step"] = stages_of(begun)[0].last
    falls = begun.optimizer.model_copy(update={"decay": "linear", "decay_share": 0.1})
    recipe = begun.model_copy(update={"optimizer": falls})
    other = CheckpointReader(branch(reader, recipe, tmp_path / "other"))
    assert (other.recipe.sparsity.reached, other.plan.weights) == (0.0, {})


def test_a_branch_of_nothing_to_do_and_of_fine_tuning_is_refused(reader, tmp_path):
    at_end = longer(reader)
    reader.recipe = reader.recipe.model_copy(update={"data": at_end.data})
    reader.run["state"]["step"] = at_end.steps
    reader.recipe = reader.recipe.model_copy(update={
        "train": at_end.train, "optimizer": at_end.optimizer.model_copy(
            update={"decay": "constant"})})
    constant = at_end.model_copy(update={"optimizer": reader.recipe.optimizer})
    with pytest.raises(ValueError, match=f"are {at_end.steps:,} steps; give more tokens"):
        branch(reader, constant, tmp_path / "other")
    with pytest.raises(ValueError, match="is of a fine-tuning run"):
        branch(reader, longer(reader, data={"train": []}), tmp_path / "other")
    with pytest.raises(ValueError, match=r"have been others: seed is 1234 there and 7 here\."):
        branch(reader, constant.model_copy(update={"seed": 7}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
