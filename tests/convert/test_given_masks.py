"""Masks that another tool has made come in as they are, with other numbers of zeros in each slice,
and go out again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import MODEL, gpt2_tensors, make_tokenizer, write_gpt2

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_export import MASKS, export
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def pruned(shares=lambda name: 0.5) -> dict[str, torch.Tensor]:
    """Tensors of a GPT-2 with zeros by magnitude in the whole matrix, so that slices have other
    numbers of them."""
    tensors = gpt2_tensors()
    for name, values in tensors.items():
        if name.endswith(LINEAR) and (share := shares(name)):
            count = round(share * values.numel())
            values.view(-1)[values.abs().flatten().argsort()[:count]] = 0.0
    return tensors


@pytest.fixture
def begin(tmp_path):
    """Makes a run of tensors: its directory, and what was said of it."""
    def begin(tensors, select="nonzero", config=None, **sections):
        write_gpt2(tmp_path / "theirs", tensors, **(config or {}))
        recipe = Recipe.model_validate({
            "output": str(tmp_path / "run"), "model": MODEL,
            "train": {"tokens": 8000, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
            "optimizer": {"lr": 1e-3}, **sections})
        source = open_weights(tmp_path / "theirs", like=recipe.model)
        begun = write_initial_checkpoint(source, recipe, make_tokenizer(), tmp_path / "run", select)
        return tmp_path / "run", begun
    return begin


def reader_of(run) -> CheckpointReader:
    return CheckpointReader(find_checkpoint(run), checksums=True)


def test_unequal_masks_come_in_and_go_out_as_they_are(begin, tmp_path):
    tensors = pruned()
    run, begun = begin(tensors)
    reader = reader_of(run)
    assert reader.recipe.sparsity.algorithm == "imported" and not list(
        rule_violations(reader.recipe))
    counts = {name: np.unpackbits(reader.held_bits(name), axis=1,
                                  count=planned.active_per_slice).sum(1)
              for name, planned in reader.plan.weights.items()}
    assert any(len(set(held)) > 1 for held in counts.values())  # the slices are unequal
    assert all(held.min() == 0 for held in counts.values())  # and the fullest sets the level
    export(reader, tmp_path / "ours", masks=True)
    ours, masks = (load_file(tmp_path / "ours" / name) for name in ("model.safetensors", MASKS))
    for name, values in tensors.items():
        assert torch.equal(ours[name], values), name
        if name.endswith(LINEAR):
            assert torch.equal(masks[name], values != 0)
    assert f"{begun.zeros:.2%} of the" in (tmp_path / "ours" / "README.md").read_text()
    zeros = [int((t == 0).sum()) for n, t in tensors.items() if n.endswith(LINEAR)]
    assert begun.zeros == sum(zeros) / sum(t.numel() for n, t in tensors.items()
                                           if n.endswith(LINEAR))


def test_each_weight_has_the_level_of_its_own(begin):
    def share(name: str) -> float:
        return {"attn.c_proj.weight": 0.0, "mlp.c_fc.weight": 0.8}.get(
            name.split(".", 3)[-1], 0.25 if ".1." in name else 0.5)

    reader = reader_of(begin(pruned(share))[0])
    planned = reader.plan.weights
    assert not [name for name in planned if "linear_proj" in name]
    assert planned["decoder.layers.0.mlp.linear_fc1.weight"].level > 0.7
    assert planned["decoder.layers.1.mlp.linear_fc2.weight"].level < 0.3


def test_equal_masks_are_static_and_one_rule_serves_all_layers(begin):
    tensors = gpt2_tensors()
    for name, values in tensors.items():
        if name.endswith(LINEAR):  # (in, out); every second of what slices do not cut
            (values[:, ::2] if "c_proj" in name else values[::2]).zero_()
    reader = reader_of(begin(tensors)[0])
    sparsity = reader.recipe.sparsity
    assert sparsity.algorithm == "static" and reader.plan.sparsity == 0.5
    assert sorted((rule.weights.count("*"), rule.level) for rule in sparsity.rules) == 4 * [
        (1, 0.5)]


def test_a_slice_without_zeros_and_one_without_values(begin, tmp_path):
    tensors = pruned(lambda name: 0.0)
    weight = tensors["transformer.h.0.mlp.c_fc.weight"]  # (in, out): slices are columns
    weight[:, :5] = 0.0
    run, _ = begin(tensors)
    reader = reader_of(run)
    (planned,) = reader.plan.weights.values()
    assert planned.active_per_slice == math.prod(planned.slice_shape)
    assert torch.equal(reader.weight(planned.name), weight.T)


def test_zeros_by_chance_make_no_mask(begin):
    tensors = gpt2_tensors()
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = 0.0
    with pytest.raises(ValueError, match="no linear weight has over 1% zeros.*--select magnitude"):
        begin(tensors)


@pytest.mark.parametrize("sections, said", [
    ({"sparsity": 0.5}, "the recipe keeps .* leave out sparsity.level"),
    ({"sparsity": {"algorithm": "set"}}, "different numbers of zeros.*leave the algorithm out"),
    ({"stages": [{"share": 0.5, "sparsity": 0.5}, {"share": 0.5, "sparsity": 0}]},
     "leave out stages")])
def test_a_recipe_that_wants_other_masks_is_refused(begin, sections, said):
    with pytest.raises(ValueError, match=said):
        begin(pruned(), **sections)


def test_zeros_that_nothing_holds_are_counted(begin):
    run, begun = begin(pruned(), select="random")
    assert not begun.plan.weights and begun.zeros == pytest.approx(0.5, abs=0.01)


DENSE = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
         "sparsity_config": {"format": "dense", "sparsity_structure": "unstructured",
                             "global_sparsity": 0.5, "ignore": ["lm_head"]}}


def test_plain_storage_of_llm_compressor_is_read(begin):
    run, _ = begin(pruned(), config={"quantization_config": DENSE})
    assert reader_of(run).plan.weights


@pytest.mark.parametrize("block, said", [
    (DENSE | {"format": "pack-quantized"}, "quantization_config.format='pack-quantized'"),
    (DENSE | {"sparsity_config": {"format": "sparse-24-bitmask"}},
     "sparsity_config.format='sparse-24-bitmask'"),
    ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'")])
def test_packed_storage_is_refused_by_name(tmp_path, block, said):
    write_gpt2(tmp_path / "theirs", pruned(), quantization_config=block)
    with pytest.raises(ValueError, match=said) as error:
        open_weights(tmp_path / "theirs")
    assert "use the model that it was made from" in str(error.value)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
