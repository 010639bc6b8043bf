"""Reading GPT-2s of Hugging Face: every form they are kept in, and what must be refused."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import CONFIG, MODEL, gpt2_tensors, write_gpt2

from megatron_spdf.architecture.forms import pad_vocabulary
from megatron_spdf.convert.huggingface_import import HuggingFaceReader
from megatron_spdf.convert.source import open_weights


def same(one: HuggingFaceReader, other: HuggingFaceReader) -> bool:
    return all(torch.equal(one.weight(name), other.weight(name)) for name in one.weights)


def test_every_weight_lies_where_megatron_core_has_it(gpt2):
    reader, theirs = open_weights(gpt2), gpt2_tensors()
    assert {key: getattr(reader.model, key)
            for key in MODEL} == MODEL and reader.model.query_groups == 6
    assert all(reader.weight(name).shape == weight.shape for name, weight in reader.weights.items())
    block, h = "decoder.layers.1.", "transformer.h.1."
    fused, bias = reader.weight(f"{block}self_attention.linear_qkv.weight"), reader.weight(
        f"{block}self_attention.linear_qkv.bias")
    for head in range(6):
        for part in range(3):  # q, k, v
            for i in range(2):
                row, column = head * 6 + part * 2 + i, part * 12 + head * 2 + i
                assert torch.equal(fused[row], theirs[f"{h}attn.c_attn.weight"][:, column])
                assert bias[row] == theirs[f"{h}attn.c_attn.bias"][column]
    for ours, name in (("self_attention.linear_proj", "attn.c_proj"),
                       ("mlp.linear_fc1", "mlp.c_fc"), ("mlp.linear_fc2", "mlp.c_proj")):
        assert torch.equal(reader.weight(f"{block}{ours}.weight"), theirs[f"{h}{name}.weight"].T)
        assert torch.equal(reader.weight(f"{block}{ours}.bias"), theirs[f"{h}{name}.bias"])
    for ours, name in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
        assert torch.equal(reader.weight(f"{block}{ours}.weight"), theirs[f"{h}{name}.weight"])
    assert torch.equal(reader.weight("embedding.word_embeddings.weight")[:259],
                       theirs["transformer.wte.weight"])
    assert torch.equal(reader.weight("embedding.position_embeddings.weight"),
                       theirs["transformer.wpe.weight"])
    assert torch.equal(reader.weight("decoder.final_layernorm.bias"),
                       theirs["transformer.ln_f.bias"])


def bare(directory):
    (directory / "model.safetensors").unlink()
    return directory


def test_all_forms_of_the_files_hold_the_same(gpt2, tmp_path):
    tensors, reader = gpt2_tensors(), HuggingFaceReader(gpt2)
    head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 10, 10),
             "h.1.attn.masked_bias": torch.ones(())}
    assert same(reader, HuggingFaceReader(write_gpt2(tmp_path / "bare names",
                                                     gpt2_tensors(prefix=""))))
    assert same(reader, HuggingFaceReader(write_gpt2(tmp_path / "head", tensors | head | masks)))
    untied = write_gpt2(tmp_path / "untied", tensors | head, tie_word_embeddings=False)
    assert same(reader, HuggingFaceReader(untied))
    for name, new in (("zip", True), ("legacy", False)):
        place = bare(write_gpt2(tmp_path / name))
        torch.save(tensors | head, place / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        assert same(reader, HuggingFaceReader(place))
    for kind, save in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        place = bare(write_gpt2(tmp_path / f"several {kind}"))
        halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
        for i, half in enumerate(halves):
            save(half, place / f"{i}{kind[-12:]}")
        listed = {name: f"{i}{kind[-12:]}" for i, half in enumerate(halves) for name in half}
        (place / f"{kind}.index.json").write_text(json.dumps({"weight_map": listed}))
        assert same(reader, HuggingFaceReader(place))


def test_defaults_of_a_configuration_are_those_of_gpt2(tmp_path):
    place = write_gpt2(tmp_path / "gpt2", n_inner=None)
    with pytest.raises(ValueError,
                       match=r"mlp.c_fc.weight has shape \(12, 30\), and by config.json .* \(12, "
                             r"48\)"):
        HuggingFaceReader(place).weight("decoder.layers.0.mlp.linear_fc1.weight")
    kept = {key: value for key,
            value in CONFIG.items() if key not in ("activation_function", "layer_norm_epsilon")}
    (place / "config.json").write_text(json.dumps(kept))
    assert HuggingFaceReader(place).model.ffn_hidden == 30


def test_half_precision_becomes_float32_masters(tmp_path):
    halves = {name: tensor.half() for name, tensor in gpt2_tensors().items()}
    reader = HuggingFaceReader(write_gpt2(tmp_path / "half", halves))
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert reader.weight(name).dtype == torch.float16
    assert torch.equal(reader.master(name), halves["transformer.h.0.mlp.c_proj.weight"].float().T)


@pytest.mark.parametrize("config, message", [
    ({"model_type": "bert"}, "is a model of type 'bert'; those that can be read are gpt2"),
    ({"activation_function": "relu"},
     "activation_function='relu', and our GPT computes 'gelu_new' or 'gelu_py"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, and our GPT computes 1e-05"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False, and our GPT computes True"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"n_head": None}, "n_head=None, where input should be a valid integer"),
    ({"n_layer": 3}, "has no tensor h.2.ln_1.weight, h.2.ln_1.bias, .* and 8 more, which a GPT-2 "
                     "of 3 layers has"),
    ({"n_layer": 1}, "has transformer.h.1.attn.c_attn.bias, .*which would be lost"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings false, but there is no lm_head.weight"),
])
def test_other_architectures_are_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceReader(write_gpt2(tmp_path / "gpt2", **config))


def test_other_weights_are_refused(tmp_path):
    tensors = gpt2_tensors()
    other = {"lm_head.weight": tensors["transformer.wte.weight"] + 1e-3}
    with pytest.raises(ValueError, match="lm_head.weight is not the token embedding"):
        HuggingFaceReader(write_gpt2(tmp_path / "head", tensors | other))
    with pytest.raises(ValueError, match="has score.weight, which GPT2LMHeadModel has not"):
        HuggingFaceReader(write_gpt2(tmp_path / "score",
                                     tensors | {"score.weight": torch.ones(2, 12)}))
    quantized = tensors | {"transformer.wpe.weight": torch.ones(10, 12, dtype=torch.int8)}
    with pytest.raises(ValueError, match="wpe.weight is torch.int8; quantized"):
        HuggingFaceReader(write_gpt2(tmp_path / "int8",
                                     quantized)).weight("embedding.position_embeddings.weight")


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_damaged_files_are_named(gpt2, tmp_path):
    weights = gpt2 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        HuggingFaceReader(gpt2)
    weights.unlink()
    with pytest.raises(ValueError,
                       match="has neither model.safetensors nor pytorch_model.bin.*there are "
                             "config.json"):
        HuggingFaceReader(gpt2)
    torch.save({"transformer.wte.weight": Code()}, gpt2 / "pytorch_model.bin")
    with pytest.raises(ValueError, match="without running code .it wants .__builtin__.print"):
        HuggingFaceReader(gpt2)
    (gpt2 / "pytorch_model.bin").rename(gpt2 / "0.bin")
    (gpt2 / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "0.bin", "b": "1.bin"}})
    )
    with pytest.raises(ValueError,
                       match="has no file 1.bin, which pytorch_model.bin.index.json names"):
        HuggingFaceReader(gpt2)
    (gpt2 / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        open_weights(gpt2)
    with pytest.raises(ValueError,
                       match="nowhere holds no weights; give a run directory, a checkpoint of a "
                             "run, or"):
        open_weights(tmp_path / "nowhere")


def test_padding_costs_a_trained_model_next_to_nothing():
    """The loss grows by at most log(1 + padding / vocabulary), wherever the logits lie; with zeros
    it may explode."""
    numbers = np.random.default_rng(0)
    hidden = torch.from_numpy(numbers.normal(size=(50, 16)))
    # (V, h), logits below zero
    embedding = torch.from_numpy(numbers.normal(size=(97, 16))) - 4 * hidden.mean(0)
    hidden = hidden + 3 * hidden.mean(0) / hidden.mean(0).norm() ** 2

    def losses(rows):
        return torch.logsumexp(hidden @ rows.T, dim=1) - (hidden @ embedding.T)[:, 5]

    padded = pad_vocabulary(embedding, 128)
    assert padded.shape == (128, 16) and torch.equal(padded[:97], embedding)
    grown = losses(padded) - losses(embedding)
    assert (grown >= 0).all() and grown.max() <= math.log(1 + 31 / 97)
    zeros = torch.cat([embedding, torch.zeros(31, 16)])
    assert (losses(zeros) - losses(embedding)).max() > 3
