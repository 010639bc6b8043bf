"""Run directories that begin from given weights: what is written, what is refused, and that nothing
is half there."""

import json
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import MODEL, make_recipe, make_tokenizer

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.inspect import describe, render, verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint, stored_name
from megatron_spdf.checkpoint.run_metadata import seeded_masks
from megatron_spdf.checkpoint.tensors import TensorFiles
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.runs.run_dir import RECIPE, RunDir
from megatron_spdf.sparsity.patterns.unstructured import draw_mask, largest_mask
from megatron_spdf.sparsity.slices import slice_of

FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture
def begin(gpt2, tokenizer, tmp_path):
    """Makes a run from the GPT-2 and reads it back."""
    def begin(name: str = "run", source=None, select: str = "random",
              **sections) -> CheckpointReader:
        write_initial_checkpoint(source or open_weights(gpt2), make_recipe(**sections), tokenizer,
                                 tmp_path / name, select)
        return CheckpointReader(find_checkpoint(tmp_path / name), checksums=True)
    return begin


def test_a_dense_run_holds_the_weights_and_a_fresh_optimizer(gpt2, begin):
    reader, source = begin(train={"precision": "fp32"}), open_weights(gpt2)
    assert verify(reader).startswith("28 weights and their optimizer state are there, 0 masks")
    for name in reader.weights:
        assert torch.equal(reader.weight(name), source.weight(name))
        assert torch.equal(reader.master(name), source.weight(name))
        for state in reader.recipe.optimizer.states:
            assert not reader.tensor(f"optimizer.state.{state}.{stored_name(name)}").any()


def test_masters_keep_what_bf16_loses(gpt2, begin):
    reader, source = begin(train={"precision": "bf16"}, sparsity=0.5), open_weights(gpt2)
    assert reader.weight(FC1).dtype == torch.bfloat16 and reader.master(FC1).dtype == torch.float32
    kept = reader.master(FC1) != 0
    assert torch.equal(reader.master(FC1)[kept], source.weight(FC1)[kept])
    assert torch.equal(reader.weight(FC1), reader.master(FC1).bfloat16())
    denser = begin("densified", reader, sparsity=0.0)  # from the masters, not from bf16
    assert torch.equal(denser.master(FC1), reader.master(FC1))
    # its masks lie in the others
    pruned = begin("pruned", reader, train={"precision": "bf16"}, sparsity=0.75)
    assert torch.equal(pruned.master(FC1), reader.master(FC1) * (pruned.master(FC1) != 0))
    assert not torch.equal(pruned.master(FC1), pruned.weight(FC1).float())


@pytest.mark.slow
def test_random_masks_are_those_of_the_plan_and_magnitudes_are_not(gpt2, begin):
    drawn, largest = begin(sparsity=0.5), begin("largest", select="magnitude", sparsity=0.5)
    assert drawn.masks == seeded_masks(drawn.plan)
    assert largest.masks["kind"] == "stored"
    source = open_weights(gpt2).weight(FC1)
    for reader, mask_of in ((drawn, lambda entries, k, c: draw_mask(0, FC1, c, entries.size, k)),
                            (largest, lambda entries, k, c: largest_mask(entries, k))):
        planned = reader.plan.weights[FC1]
        for slice_id in range(6):
            entries = slice_of(source, planned, slice_id).numpy()
            mask = mask_of(entries, planned.active_per_slice, slice_id)
            assert np.array_equal(slice_of(reader.master(FC1), planned, slice_id).numpy(),
                                  entries * mask)
        assert "8 masks are as planned" in verify(reader)
        assert f"masks {reader.masks['how']}" in render(describe(reader))


def test_the_largest_are_kept_ties_by_position():
    values = np.array([0.5, -2.0, 0.0, -0.5, 3.0, 0.5], np.float32)
    assert largest_mask(values, 3).tolist() == [True, True, False, False, True, False]
    assert largest_mask(values, 4).tolist() == [True, True, False, True, True, False]
    assert largest_mask(np.zeros(5, np.float32), 2).tolist() == [True, True, False, False, False]


def test_given_masks_are_held_to_their_density_only(begin, tmp_path):
    reader = begin(sparsity=0.5, select="magnitude")
    run = json.loads((reader.path / store.RUN).read_text())
    run["masks"] = seeded_masks(reader.plan)
    (reader.path / store.RUN).write_text(json.dumps(run))
    (reader.path / store.FILES).write_text(json.dumps(
        {name: store.describe(reader.path / name) for name in store.files_of(reader.path)}))
    with pytest.raises(store.DamagedCheckpoint, match="another mask than seed 0 draws"):
        verify(CheckpointReader(reader.path))


def test_the_directory_is_one_that_pretraining_goes_on_from(begin, tmp_path):
    reader = begin(sparsity=0.5)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "recipe.yaml"]
    recipe = load_recipe(tmp_path / "run" / RECIPE)
    assert recipe.output == str(tmp_path / "run") and recipe.sparsity.level == 0.5
    RunDir(recipe).check()
    RunDir(make_recipe(output=str(tmp_path / "run"), sparsity=0.5)).check()
    assert (reader.path / "metadata.json").read_text() == (
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": '
        '"torch", "common_backend_version": 1}')
    assert torch.load(reader.path / "common.pt", weights_only=True) == {}
    assert reader.run["origin"] == "the Hugging Face model gpt2" and reader.run["tokens"] == 0
    assert set(reader.run["state"].values()) <= {0, None}  # nothing done, and no best loss yet


def test_files_are_cut_for_the_layout(begin):
    layout = {"tensor": 3, "pipeline": 2}
    reader, whole = begin(parallel=layout, sparsity=0.5), begin("whole", sparsity=0.5)
    index = pickle.loads((reader.path / ".metadata").read_bytes())
    files = {name: set() for name in reader.shapes}
    for place, info in index.storage_data.items():
        files[place.fqn].add(int(info.relative_path.removeprefix("__").removesuffix("_0.distcp")))
    assert files["embedding.word_embeddings.weight"] == {0, 1, 2}
    assert files["embedding.position_embeddings.weight"] == {0}
    assert files["decoder.layers.0.mlp.linear_fc1.weight.values"] == {0, 1, 2}
    assert files["optimizer.state.exp_avg.decoder.layers.1.mlp.linear_fc1.weight.values"] == {
        3,
        4,
        5,
    }
    assert files["decoder.layers.1.mlp.linear_fc1.weight.mask_bits"] == {3, 4, 5}
    assert (
        files["decoder.layers.1.mlp.linear_fc2.bias"]
        == files["decoder.final_layernorm.bias"]
        == {3}
    )
    assert all(torch.equal(reader.tensor(name), whole.tensor(name)) for name in whole.shapes)


def test_densify_and_prune_begin_from_runs(begin, tmp_path):
    sparse = begin(sparsity=0.75)
    dense = begin("dense", sparse, sparsity=0.0)
    assert not dense.plan.weights and dense.run["origin"] == "step 0 of the run run"
    assert all(torch.equal(dense.weight(name), sparse.weight(name)) for name in sparse.weights)
    pruned = begin("pruned", dense, select="magnitude", sparsity=0.75)
    # a quarter was left, and it is the largest
    assert torch.equal(pruned.weight(FC1), sparse.weight(FC1))
    half = begin("half", dense, select="magnitude", sparsity=0.5)
    assert half.run["sparsity"][FC1]["target"] == 0.5
    # a quarter of zeros was kept
    assert half.run["sparsity"][FC1]["measured"] == pytest.approx(0.75, abs=0.01)


def test_another_shape_or_tokenizer_is_refused_with_both_values(gpt2, tokenizer, tmp_path):
    source = open_weights(gpt2)
    other = make_recipe(model=MODEL | {"layers": 4, "max_positions": 20})
    with pytest.raises(ValueError,
                       match="model.layers is 2 there and 4 in the recipe; model.max_positions is "
                             "10 there and 20 in the recipe"):
        write_initial_checkpoint(source, other, tokenizer, tmp_path / "run")
    theirs = make_tokenizer(merges=3)
    theirs.save(tmp_path / "tokenizer")
    for name in theirs.file_names:
        (tmp_path / "tokenizer" / name).rename(gpt2 / name)
    with pytest.raises(ValueError,
                       match=f"{theirs.sha256} .gpt2-bpe, 260 tokens.*{tokenizer.sha256} "
                             ".gpt2-bpe, 259"):
        write_initial_checkpoint(open_weights(gpt2), make_recipe(), tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_half_written_is_left(gpt2, tokenizer, tmp_path, monkeypatch):
    source = open_weights(gpt2)
    whole = source.weight

    for fault in (OSError("no space left"), KeyboardInterrupt(), SystemExit(143)):
        def fail(name, fault=fault):
            if name == FC1:
                raise fault
            return whole(name)

        monkeypatch.setattr(source, "weight", fail)
        with pytest.raises(type(fault)):
            write_initial_checkpoint(source, make_recipe(), tokenizer, tmp_path / "run")
        assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]
    monkeypatch.setattr(source, "weight", whole)
    (tmp_path / "run.partial").mkdir()  # of one that was killed
    (tmp_path / "run.partial" / "rest").touch()
    write_initial_checkpoint(source, make_recipe(), tokenizer, tmp_path / "run")
    with pytest.raises(ValueError, match="run exists; give a new directory"):
        write_initial_checkpoint(source, make_recipe(), tokenizer, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "run"]
    assert not list((tmp_path / "run").rglob("rest"))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_one_weight_at_a_time_is_dense(gpt2, begin, monkeypatch, sparsity):
    source, given = open_weights(gpt2), []
    whole = source.weight

    def watched(name):
        alive = [tensor for tensor in given if tensor() is not None]
        assert len(alive) <= 1  # the last one, which is still being written
        tensor = whole(name).clone()
        given.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(source, "weight", watched)
    begin("run", source, sparsity=sparsity, parallel={"tensor": 3})
    # weight and master; pruned once
    assert len(given) == (28 - 8 if sparsity else 28) * 2 + (8 if sparsity else 0)


def test_a_file_that_cannot_be_read_is_named(begin):
    reader = begin()
    file = reader.path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(store.DamagedCheckpoint,
                       match="decoder.final_layernorm.bias, in __0_0.distcp, cannot be read"):
        reader.tensor("decoder.final_layernorm.bias")
    with pytest.raises(store.DamagedCheckpoint, match="of __0_0.distcp, which has 5,000"):
        TensorFiles(reader.path)
    file.unlink()
    with pytest.raises(store.DamagedCheckpoint, match="in __0_0.distcp, cannot be read"):
        reader.tensor("decoder.final_layernorm.bias")
    with pytest.raises(store.DamagedCheckpoint, match="names __0_0.distcp, which is missing"):
        TensorFiles(reader.path)


def test_the_other_half_of_a_tensor_is_missed(begin):
    reader = begin(parallel={"tensor": 3})
    path = Path(reader.path / ".metadata")
    index = pickle.loads(path.read_bytes())
    del index.state_dict_metadata["embedding.word_embeddings.weight"].chunks[1]
    path.write_bytes(pickle.dumps(index))
    with pytest.raises(store.DamagedCheckpoint, match="not hold every number of embedding"):
        TensorFiles(reader.path, objects=True).tensor("embedding.word_embeddings.weight")


@pytest.mark.slow
@pytest.mark.parametrize("base", [{"hidden": 3, "head_width": 1, "input_multiplier": 3.0,
                                   "output_multiplier": 2.0},
                                  {"hidden": 6, "density": 0.5}, {}])
@pytest.mark.parametrize("level", [0.75, 0.0])
def test_a_run_of_another_parametrization_computes_with_the_same_weights(begin, gpt2, base, level):
    """`weight` and `master` are those of the standard model, whatever a run's parameters are."""
    rules = {"parametrization": "mup", "train": {"precision": "fp32"},
             "mup_base": {"hidden": 4, "head_width": 8, "input_multiplier": 5.0,
                          "output_multiplier": 0.5}}
    sparse, given = begin(sparsity=0.5, **rules), open_weights(gpt2)
    assert not torch.equal(sparse.parameter(QKV), sparse.master(QKV))
    other = rules | {"mup_base": base} if base else {"train": rules["train"]}
    became = begin("other", sparse, sparsity=level, **other)
    for name in sparse.weights:
        kept = became.weight(name) != 0
        assert torch.allclose(became.weight(name), kept * sparse.weight(name)), name
        assert torch.allclose(sparse.weight(name)[kept], given.weight(name)[kept]), name
        assert torch.allclose(became.master(name), became.weight(name)), name
