"""Configurations of transformers that are damaged, key by key, make a model or are refused, and
what is refused is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Qwen2Config

from megatron_spdf.architecture.base import ARCHITECTURES
from megatron_spdf.architecture.forms import model_of

SHAPE = {"layers": 2, "hidden": 64, "heads": 4, "vocab_size": 300, "max_positions": 32}
ODD = [None, "x", [], [[]], {"a": 1}, -1, 0, 0.5, True, 10**400, "64", ["x"], {"factor": [1]}]
# read where they are there
MORE = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "head_dim",
        "partial_rotary_factor", "rope_theta", "rope_scaling", "n_inner")
FAMILIES = [ARCHITECTURES.get(name) for name in ("gpt", "llama", "mistral", "qwen2", "qwen3")]


def configuration(family: type, release: int = 5) -> dict[str, Any]:
    grouped = {} if family.name == "gpt" else {"query_groups": 2, "ffn_hidden": 96}
    made = family(**SHAPE, **grouped)
    config = made.huggingface_config() | {"model_type": family.huggingface}
    if release == 4:
        config = config | made.huggingface_legacy()
        config.pop("rope_parameters", None)
    return config


def damaged(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in (*config, *MORE):
        yield {k: v for k, v in config.items() if k != key}
        for odd in ODD:
            yield config | {key: odd}
            if isinstance(config.get(key), dict):
                yield from (config | {key: config[key] | {inner: odd}} for inner in config[key])


@pytest.mark.parametrize("release", [4, 5])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_any_key_may_be_missing_or_odd(family, release):
    config, refused = configuration(family, release), 0
    assert type(model_of(config, FAMILIES)) is family
    for wrong in damaged(config):
        try:
            model_of(wrong, FAMILIES)
        except ValueError as error:  # and nothing else
            refused += 1
            assert str(error).startswith(("has ", "makes no model, of ", "is a model of type "))
    assert refused > 100


@pytest.mark.parametrize(("family", "wrong", "said"), [
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps=None, where input should be a valid number"),
    ("llama", {"rope_parameters": {"rope_theta": None}}, "has rope_theta=None"),
    ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "which must be a number over 0"),
    ("llama", {"head_dim": 0}, "head_width=0, where input should be greater than 0"),
    ("llama", {"layer_types": "full_attention"}, "layer_types='full_attention', where input"),
    ("llama", {"layer_types": [1]}, "layer_types.0=1, where input should be a valid string"),
    ("qwen2", {"partial_rotary_factor": []}, "has partial_rotary_factor=[]"),
    ("qwen2", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no', where input should be"),
    ("qwen3", {"num_hidden_layers": 2.0}, "num_hidden_layers=2.0, where input should be a valid"),
    ("mistral", {"sliding_window": "4096"}, "sliding_window='4096', where input should be a"),
    ("gpt", {"n_inner": 0}, "ffn_hidden=0, where input should be greater than 0"),
    ("gpt", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no', where input should be")])
def test_what_is_odd_is_named(family, wrong, said):
    with pytest.raises(ValueError) as refused:
        model_of(configuration(ARCHITECTURES.get(family)) | wrong, FAMILIES)
    assert said in str(refused.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "max_position_embeddings"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_size_that_is_missing_is_named(family, key):
    config = configuration(ARCHITECTURES.get(family)) | {"use_sliding_window": True}
    for absent in ("sliding_window", key):
        config.pop(absent, None)
    with pytest.raises(ValueError, match=f"^has no {key}; use the config.json the model was"):
        model_of(config, FAMILIES)


@pytest.mark.parametrize(("family", "kept", "narrower"), [
    # a window as long as the positions narrows nothing
    ("mistral", {"sliding_window": 32}, {"sliding_window": 31}),
    # layers from max_window_layers on have one
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
     {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
     {"use_sliding_window": True, "sliding_window": 31, "max_window_layers": 1})])
def test_a_window_that_narrows_no_layer_is_none(family, kept, narrower):
    config = configuration(ARCHITECTURES.get(family))
    model_of(config | kept, FAMILIES)
    with pytest.raises(ValueError, match="has sliding_window=.*every token attends to all"):
        model_of(config | narrower, FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_an_exported_model_drops_what_the_recipe_drops(family, rate):
    """Of GPT-2 in embeddings, attention and every output; of the others, in attention alone."""
    grouped = {} if family.name == "gpt" else {"query_groups": 2, "ffn_hidden": 96}
    made = family(**SHAPE, **grouped, dropout=rate)
    config = AutoConfig.for_model(made.huggingface, **made.huggingface_config())
    model = AutoModelForCausalLM.from_config(config)
    modules = {name: module.p for name, module in model.named_modules()
               if isinstance(module, nn.Dropout)}
    assert set(modules.values()) <= {rate} and bool(modules) == (family.name == "gpt")
    kept = {key: value for key, value in config.to_dict().items() if "drop" in key}
    kept.pop("summary_first_dropout", None)  # of GPT-2's classifiers
    assert kept and set(kept.values()) == {rate}


def test_what_a_configuration_leaves_out_is_what_transformers_takes():
    windows = configuration(ARCHITECTURES.get("mistral"))
    del windows["sliding_window"]
    usual = MistralConfig().sliding_window
    model_of(windows | {"max_position_embeddings": usual}, FAMILIES)
    with pytest.raises(ValueError, match=f"has sliding_window={usual}"):
        model_of(windows | {"max_position_embeddings": usual + 1}, FAMILIES)
    layers = configuration(ARCHITECTURES.get("qwen2")) | {"use_sliding_window": True,
                                                          "sliding_window": 16}
    usual = Qwen2Config().max_window_layers
    model_of(layers | {"num_hidden_layers": usual}, FAMILIES)
    with pytest.raises(ValueError, match="has sliding_window=16"):
        model_of(layers | {"num_hidden_layers": usual + 1}, FAMILIES)
    config = configuration(ARCHITECTURES.get("qwen2"))
    del config["rms_norm_eps"]
    assert model_of(config, FAMILIES).norm_eps == Qwen2Config().rms_norm_eps


def test_frequencies_are_slowed_by_a_factor_of_one_or_more():
    scaled = {"rope_theta": 1e4, "rope_type": "llama3", "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = configuration(ARCHITECTURES.get("llama"))
    assert model_of(config | {"rope_parameters": scaled | {"factor": 1.0}},
                    FAMILIES).rotary_scaling == 1.0
    with pytest.raises(ValueError, match="has factor=0.99 .* must be at least 1"):
        model_of(config | {"rope_parameters": scaled | {"factor": 0.99}}, FAMILIES)
