"""Files of an exported model: tensors in safetensors' own reading, masks, configuration and card;
tests/cli/test_convert.py loads them with transformers."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from small_models import gpt2_tensors, make_recipe, make_tokenizer

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert import huggingface_export
from megatron_spdf.convert.huggingface_export import DTYPES, export, in_memory, model_card
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.sparsity.algorithms.gmp import Gmp


@pytest.fixture
def source(gpt2, tokenizer, tmp_path):
    """The GPT-2 with its tokenizer, dense, or as a run of some sparsity."""
    tokenizer.save(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(gpt2 / file.name)
    dense = open_weights(gpt2)

    def of(sparsity: float | None = None, select: str = "random"):
        if sparsity is None:
            return dense
        recipe = make_recipe(sparsity=sparsity, train={"precision": "fp32"})
        write_initial_checkpoint(dense, recipe, make_tokenizer(), tmp_path / "run", select)
        return CheckpointReader(find_checkpoint(tmp_path / "run"))
    return of


def read(path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        return {name: opened.get_tensor(name) for name in opened.keys()}


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_tensors_are_those_of_the_model(source, tmp_path, dtype, kind):
    export(source(), tmp_path / "out", dtype)
    found = read(tmp_path / "out" / "model.safetensors")
    theirs = gpt2_tensors()
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(found[name], tensor.to(kind)), name
    head = (tmp_path / "out" / "model.safetensors").read_bytes()[:8]
    assert int.from_bytes(head, "little") % 8 == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer_config.json", "vocab.json"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["n_head"], config["n_inner"]) == (2, 12, 6,
                                                                                          30)
    assert config["bos_token_id"] == config["eos_token_id"] == 258
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["pad_token_id"] == generation["eos_token_id"] == 258
    assert not generation.get("suppress_tokens")
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer == {
        "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": 10,
        "clean_up_tokenization_spaces": False, "add_prefix_space": False}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>", "add_prefix_space": False}


@pytest.mark.parametrize("begin", [None, "<s>"])
@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("kind", ["huggingface", "gpt2-bpe", "sentencepiece"])
def test_the_configuration_of_a_tokenizer_says_what_it_does(monkeypatch, tmp_path, kind, blank,
                                                            begin):
    """What it puts before texts, and its tokens; what came with it is stronger."""
    compared = []
    monkeypatch.setattr(huggingface_export, "_compare_ids",
                        lambda tokenizer, place: compared.append(tokenizer))
    for declared in ({}, {"ends": [1, 2], "eos_token": "<|im_end|>", "chat_template": "x"}):
        tokenizer = SimpleNamespace(kind=kind, end_token="</s>", begin_token=begin,
                                    declared=declared, adds_blank=blank, save=lambda place: None)
        huggingface_export._save_tokenizer(SimpleNamespace(
            tokenizer=tokenizer, model=SimpleNamespace(max_positions=17)), tmp_path)
        own = {"huggingface": FAST, "gpt2-bpe": GPT2, "sentencepiece": {
            "tokenizer_class": "LlamaTokenizer", "add_bos_token": begin is not None,
            "add_prefix_space": blank}}[kind]
        assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
            "eos_token": "</s>", "bos_token": begin or "</s>", "model_max_length": 17,
            "clean_up_tokenization_spaces": False, **own,
            **{key: said for key, said in declared.items() if key != "ends"}}
    assert len(compared) == (2 if kind == "sentencepiece" else 0)


@pytest.mark.parametrize("kilobytes", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_cut_as_transformers_cuts_them(source, tmp_path, dtype, kilobytes):
    export(source(), tmp_path / "out", dtype, shard_size=kilobytes / 1e6)
    theirs = {name: tensor.to(DTYPES[dtype]) for name, tensor in gpt2_tensors().items()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    order = dict.fromkeys(index["weight_map"])
    cut = split_torch_state_dict_into_shards({name: theirs[name] for name in order},
                                             max_shard_size=1000 * kilobytes)
    assert len(cut.filename_to_tensors) > 2 and index["weight_map"] == cut.tensor_to_filename
    assert index["metadata"] == {"total_size": cut.metadata["total_size"]}
    for file, names in cut.filename_to_tensors.items():
        found = read(tmp_path / "out" / file)
        assert found.keys() == set(names)
        assert all(torch.equal(found[name], theirs[name]) for name in names)


@pytest.mark.parametrize("select", ["random", "magnitude"])
def test_masks_have_the_form_of_their_weights(source, tmp_path, select):
    reader = source(0.5, select)
    export(reader, tmp_path / "out", masks=True)
    masks, weights = (read(tmp_path / "out" / name) for name in ("masks.safetensors",
                                                                 "model.safetensors"))
    matrices = [f"transformer.h.{layer}.{name}.weight" for layer in range(2)
                for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert sorted(masks) == sorted(matrices)
    theirs = gpt2_tensors()
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.float().mean() == 0.5
        assert torch.equal(weights[name], theirs[name] * mask)
    model = in_memory(reader)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) and not model.training
    with pytest.raises(ValueError, match="is dense and has no masks; leave out --masks"):
        export(source(), tmp_path / "other", masks=True)


@pytest.mark.parametrize(("other", "said"), [
    ({"tie_word_embeddings": False}, r"lm_head.weight is nothing here and \(\d+, 12\) in"),
    ({"n_layer": 1}, "transformer.h.1.ln_1.weight is .* here and nothing in .* as are 11 more"),
    ({"n_inner": 31}, r"h.0.mlp.c_fc.weight is \(12, 30\) here and \(12, 31\) in .* 5 more")])
def test_tensors_that_transformers_has_not_are_refused(source, tmp_path, monkeypatch, other, said):
    model = type(source().model)
    config = model.huggingface_config
    monkeypatch.setattr(model, "huggingface_config", lambda self: config(self) | other)
    with pytest.raises(ValueError, match=f"architecture=gpt cannot be exported: .*{said}"):
        export(source(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_the_model_is(source):
    lines = model_card(source(0.75, "magnitude"), "bf16", masks=True).splitlines()
    weights = sum(w.numel for w in source().weights.values())
    linear = 2 * (12 * 36 + 12 * 12 + 2 * 12 * 30)
    said = [line for line in lines if line.startswith("- ")]
    assert said[0].startswith(f"- Architecture: GPT-2, tied embeddings, {weights:,} parameters")
    assert said[1].startswith(
        f"- Sparsity: 75.00% of the {linear:,} weights in 8 matrices of the blocks are exactly zero"
        " (static masks, the largest magnitudes in each slice of the Hugging Face model gpt2), so "
        f"{linear // 4:,} of them are active.")
    assert said[2].startswith("- Training: step 0, 0 tokens, in fp32; saved ")
    assert said[3:5] == ["- Begun from: the Hugging Face model gpt2.", "- Weights: bf16."]
    assert said[5].startswith("- Masks: `masks.safetensors` holds a bool")
    assert "## Recipe" in lines and "# GPT-2, 2 layers x 12" in lines
    plain = model_card(source(), "fp32", masks=False)
    assert "Recipe" not in plain and "Masks" not in plain and "- Weights: fp32." in plain


def test_masks_leave_out_what_is_held_at_zero(source, tmp_path):
    """Of a checkpoint in the middle of gradual pruning: stored, and yet no active entry."""
    reader, holds = source(0.5), Gmp()
    export(reader, tmp_path / "all", masks=True)
    held, chance = {}, np.random.default_rng(3)
    for name, planned in reader.plan.weights.items():
        reader.plan.weights[name] = dataclasses.replace(planned, algorithm=holds)
        held[name] = chance.random((planned.slices, planned.active_per_slice)) < 0.25
    reader.held_bits = lambda name: np.packbits(held[name], axis=1)
    export(reader, tmp_path / "some", masks=True)
    before, after = (read(tmp_path / name / "masks.safetensors") for name in ("all", "some"))
    assert all((before[name] | ~after[name]).all() for name in before)
    for name, planned in reader.plan.weights.items():
        layer, part = name.split(".")[2], name.split(".")[-2]
        theirs = {"linear_qkv": "attn.c_attn", "linear_proj": "attn.c_proj",
                  "linear_fc1": "mlp.c_fc", "linear_fc2": "mlp.c_proj"}[part]
        key = f"transformer.h.{layer}.{theirs}.weight"
        assert before[key].sum() == planned.active
        assert before[key].sum() - after[key].sum() == held[name].sum() > 0
