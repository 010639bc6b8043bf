"""Models as other tools leave them: what transformers computes of a directory is what we read from
it, and what cannot be read is refused by the name of the tensor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import gpt2_tensors, make_recipe, write_gpt2

from megatron_spdf.architecture.base import EMBEDDING
from megatron_spdf.architecture.forms import UnknownFamily, model_of
from megatron_spdf.architecture.gpt import GELU_TANH, Gpt
from megatron_spdf.convert.deepspeed_import import DeepSpeedReader
from megatron_spdf.convert.huggingface_export import in_memory
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.megatron_lm import MegatronReader
from megatron_spdf.convert.source import open_weights
from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.training.finetune_setup import prepare

sys.path.insert(0, str(Path(__file__).parents[1]))
from huggingface_models import logits_of, make_gpt2  # noqa: E402

STUB = type("Tokenizer", (), {"bod": 96, "eod": 96, "prefix": 96, "ends": [96], "vocab_size": 97,
                             "sha256": ""})
IDS = torch.arange(14).view(2, 7)
TOLERANCE = 2e-5  # of logits with a spread near 1: some roundings of fp32


def save(directory: Path, **config) -> Path:
    """A GPT-2 that transformers wrote, with the tokenizer of its 97 ids left out."""
    make_gpt2("three heads", **config).save_pretrained(directory)
    return directory


def rename(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def read_logits(directory: Path, monkeypatch) -> torch.Tensor:
    source = open_weights(directory)
    monkeypatch.setattr(type(source), "tokenizer", STUB)
    with torch.no_grad():
        return in_memory(source)(IDS).logits


@pytest.mark.parametrize("name", GELU_TANH)
def test_every_name_of_the_tanh_approximation_computes_what_transformers_does(
        tmp_path, monkeypatch, name):
    directory = save(tmp_path / "model", activation_function=name)
    assert torch.allclose(read_logits(directory, monkeypatch), logits_of(directory, IDS),
                          atol=TOLERANCE)


def test_other_activations_of_transformers_are_not_called_the_same():
    from transformers.activations import ACT2CLS, ACT2FN

    inputs = torch.linspace(-9, 9, 4001)
    ours = torch.nn.functional.gelu(inputs, approximate="tanh")
    gelus = [name for name in ACT2CLS if "gelu" in name and name != "gelu_10"]
    same = {name for name in gelus if torch.allclose(ACT2FN[name](inputs), ours, atol=1e-5)}
    assert same == set(GELU_TANH) and "gelu" in gelus


FORMS = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "model.": lambda name: f"model.{name}",
    "without transformer.": lambda name: name.removeprefix("transformer."),
    "compiled layers": lambda name: name.replace("h.0.", "h.0._orig_mod."),
    "FSDP": lambda name: "_fsdp_wrapped_module."
                         + name.replace("h.1.", "h.1._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_that_wrappers_lengthened(gpt2, tmp_path, form):
    tensors = {FORMS[form](name): tensor for name, tensor in gpt2_tensors().items()}
    plain, read = open_weights(gpt2), open_weights(write_gpt2(tmp_path / "named", tensors))
    assert all(torch.equal(plain.weight(name), read.weight(name)) for name in plain.weights)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    twice = gpt2_tensors() | {"module.transformer.ln_f.bias": torch.ones(12)}
    with pytest.raises(ValueError, match="has both .*ln_f.bias and .*ln_f.bias, which are one"):
        open_weights(write_gpt2(tmp_path / "twice", twice))


def test_a_tied_model_may_keep_its_head_alone(tmp_path, monkeypatch):
    def head_only(tensors):
        return {"lm_head.weight" if "wte" in name else name: t for name, t in tensors.items()}

    directory = save(tmp_path / "head")
    rename(directory, head_only)
    assert torch.equal(read_logits(directory, monkeypatch), logits_of(directory, IDS))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="has no tensor wte.weight"):
        open_weights(directory)


@pytest.mark.parametrize("name, ours", [
    ("transformer.h.1.mlp.c_fc.weight", "decoder.layers.1.mlp.linear_fc1.weight"),
    ("transformer.wte.weight", EMBEDDING)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name, ours, value, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in gpt2_tensors().items()}
    tensors[name][3, 5] = value
    source = open_weights(write_gpt2(tmp_path / "model", tensors))
    source.weight("decoder.final_layernorm.weight")
    with pytest.raises(ValueError, match=rf"{name} has 1 entries.*{value} at \[3, 5\]"):
        source.master(ours)


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path):
    tensors = gpt2_tensors()
    tensors["transformer.ln_f.bias"] = torch.full((12,), 1e300, dtype=torch.float64)
    source = open_weights(write_gpt2(tmp_path / "model", tensors))
    with pytest.raises(ValueError, match="ln_f.bias has 12 entries that are not finite"):
        source.master("decoder.final_layernorm.bias")


def test_all_wrong_shapes_are_named_with_both_shapes_before_a_tensor_is_read(tmp_path):
    with pytest.raises(ValueError) as refused:
        open_weights(write_gpt2(tmp_path / "model", n_inner=40))
    for name, there, here in (("c_fc.weight", "(12, 30)", "(12, 40)"),
                              ("c_fc.bias", "(30,)", "(40,)"),
                              ("c_proj.weight", "(30, 12)", "(40, 12)")):
        assert f"{name} has shape {there}, and by config.json it must have {here}" in str(
            refused.value)
    with pytest.raises(ValueError, match="has 5 attention heads for a width of 12"):
        open_weights(write_gpt2(tmp_path / "heads", n_head=5))


def test_a_state_dict_inside_another_is_refused(gpt2):
    (gpt2 / "model.safetensors").unlink()
    torch.save({"state_dict": gpt2_tensors(), "epoch": 3}, gpt2 / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds state_dict, epoch beside tensors; save the model's "
                                         r"state_dict\(\) alone"):
        open_weights(gpt2)


def test_an_index_names_files_beside_it(gpt2, tmp_path):
    (gpt2 / "model.safetensors").rename(tmp_path / "model.safetensors")
    for name in ("../model.safetensors", str(tmp_path / "model.safetensors"), None, ".."):
        (gpt2 / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(gpt2_tensors(), name)}))
        with pytest.raises(ValueError, match="which is no file beside it|has no file"):
            open_weights(gpt2)


def test_two_copies_of_an_embedding_that_is_not_finite(tmp_path):
    tensors = gpt2_tensors()
    tensors["transformer.wte.weight"][0, 0] = float("nan")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    with pytest.raises(ValueError, match="wte.weight has 1 entries that are not finite"):
        open_weights(write_gpt2(tmp_path / "model", tensors))


def test_fine_tuning_and_conversion_refuse_weights_that_are_not_finite(tmp_path, tokenizer):
    """Fine-tuning before a device is touched, conversion before its output appears."""
    tensors = gpt2_tensors()
    tensors["transformer.h.1.attn.c_proj.bias"][3] = float("inf")
    source = open_weights(write_gpt2(tmp_path / "model", tensors))
    tokenizer.save(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(tmp_path / "model" / file.name)
    lines = [json.dumps({"context": c, "completion": c}) for c in "abcdefgh"]
    for split in ("train", "valid", "validation", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    finetune = Finetune.model_validate({
        "checkpoint": str(tmp_path / "model"), "output": "tuned",
        "data": {"task": "jsonl", "path": str(tmp_path)}, "optimizer": {"lr": 1e-3},
        "train": {"global_batch": 4, "micro_batch": 4}})
    with pytest.raises(ValueError, match=r"c_proj.bias has 1 entries.*inf at \[3\]"):
        prepare(finetune, source)
    with pytest.raises(ValueError, match=r"c_proj.bias has 1 entries.*inf at \[3\]"):
        write_initial_checkpoint(source, make_recipe(), tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reader", [MegatronReader, DeepSpeedReader])
def test_every_reader_of_other_formats_refuses_them(monkeypatch, tmp_path, reader):
    opened = object.__new__(reader)
    opened.path = tmp_path
    monkeypatch.setattr(reader, "_weight", lambda self, name: torch.tensor([1.0, float("nan")]))
    for read in (opened.weight, opened.master):
        with pytest.raises(ValueError, match=f"{EMBEDDING} has 1 entries that are not finite"):
            read(EMBEDDING)


class Wide(Gpt):
    """A family that claims GPT-2's name for what has an activation of its own."""

    @classmethod
    def from_huggingface(cls, config):
        if config.get("activation_function") != "wide":
            raise ValueError("has another activation than wide")
        return Gpt.from_huggingface({**config, "activation_function": "gelu_new"})


@pytest.mark.parametrize(("change", "said"), [
    ({"n_head": 0}, r"heads=0, where input should be greater than 0; query_groups=0, where"),
    ({"n_embd": -8}, r"hidden=-8, where"), ({"vocab_size": 10**12}, r"vocab_size=1000000000000, "),
    ({"n_inner": -1}, r"ffn_hidden=-1, where"),
    ({"n_layer": True}, r"n_layer=True, where input should be a valid integer")], ids=str)
def test_sizes_that_no_model_has_are_named(change, said):
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9,
              "n_positions": 4}
    with pytest.raises(ValueError, match=rf"^makes no model, of {said}.*; use the config.json of"):
        model_of(config | change, [Gpt])


def test_of_two_families_of_one_model_type_the_configuration_decides():
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9,
              "n_positions": 4}
    for families in ([Gpt, Wide], [Wide, Gpt]):
        assert model_of(config, families).layers == 1
        assert model_of({**config, "activation_function": "wide"}, families).layers == 1
        with pytest.raises(ValueError, match="'relu', and our GPT.*another activation than wide|"
                                             "another activation than wide.*'relu', and our GPT"):
            model_of({**config, "activation_function": "relu"}, families)
    with pytest.raises(UnknownFamily, match="architectures 'gpt' and 'gpt' both read"):
        model_of(config, [Gpt, type("Twin", (Gpt,), {})])
    with pytest.raises(UnknownFamily, match="type None; those that can be read are gpt2"):
        model_of({}, [Gpt, Wide])
