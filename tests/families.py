"""Llamas, Mistrals and Qwens made by transformers itself, with random weights, in which every part
matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
# Class of the configuration, and what it is given beside SHAPE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    "tied llama": ("LlamaConfig", {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3,
        "intermediate_size": 90, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "ungrouped llama": ("LlamaConfig", {
        "num_key_value_heads": 4, "rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 1e2}}),
    "mistral": ("MistralConfig", {"head_dim": 24, "sliding_window": None, "rms_norm_eps": 1e-5,
                                  "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True,
                              "rope_parameters": {"rope_theta": 1e6}}),
    "untied qwen2": ("Qwen2Config", {"rope_parameters": {"rope_theta": 1e6}}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "tied qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True,
                                   "rope_parameters": {"rope_theta": 1e6}}),
}


def make_family(name: str, **changes):
    """A causal language model of a family in float32; norms and biases are random too, so that none
    can be left out unnoticed."""
    import transformers

    kind, given = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**SHAPE | given | changes), attn_implementation="eager")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(0.12 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def save_family(name: str, directory: Path, **changes) -> Path:
    make_family(name, **changes).save_pretrained(directory)
    return directory
