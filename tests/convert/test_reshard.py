"""The same checkpoint with its files cut for another layout."""

import itertools
import json
import math
import shutil

import pytest
import torch
from small_models import make_recipe

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.inspect import verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.reshard import HISTORY, LOG, check_layout, reshard
from megatron_spdf.convert.source import open_weights
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Parallel
from megatron_spdf.recipe.rules import rule_violations


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


@pytest.mark.parametrize("of_a_run", [True, False])
def test_blends_and_log_of_the_steps_so_far_go_along(reader, tmp_path, of_a_run):
    """From a run directory; not what lies by chance beside a checkpoint that is kept elsewhere."""
    run = tmp_path / "run"
    (run / LOG).write_text('{"kind": "train", "step": 1}\n')
    (run / HISTORY).write_text("[]")
    (run / "other.txt").touch()
    if not of_a_run:
        (run / "recipe.yaml").unlink()
    reshard(reader, Parallel(), tmp_path / "other")
    kept = {p.name: p.read_text() for p in (tmp_path / "other").iterdir()
            if p.is_file() and p.name != "recipe.yaml"}
    assert kept == ({LOG: '{"kind": "train", "step": 1}\n', HISTORY: "[]"} if of_a_run else {})
