"""Small models, recipes and tokenizers that need no training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_spdf.data.tokenizers.gpt2 import END_OF_TEXT, Gpt2Bpe
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.recipe.recipe import Recipe

# A GPT-2 with every number another, written by hand: transformers takes seconds to import.
CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_embd": 12, "n_head": 6, "n_inner": 30,
          "vocab_size": 259,
          "n_positions": 10, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
MODEL = {"layers": 2, "hidden": 12, "heads": 6, "ffn_hidden": 30, "vocab_size": 259,
         "max_positions": 10}


def gpt2_tensors(prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (259, 12), "wpe.weight": (10, 12), "ln_f.weight": (12,),
              "ln_f.bias": (12,)}
    for layer in range(2):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in {
            "ln_1.weight": (12,), "ln_1.bias": (12,), "ln_2.weight": (12,), "ln_2.bias": (12,),
            "attn.c_attn.weight": (12, 36), "attn.c_attn.bias": (36,),
            "attn.c_proj.weight": (12, 12),
            "attn.c_proj.bias": (12,), "mlp.c_fc.weight": (12, 30), "mlp.c_fc.bias": (30,),
            "mlp.c_proj.weight": (30, 12), "mlp.c_proj.bias": (12,)}.items()}
    return {prefix + name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


def write_gpt2(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(gpt2_tensors() if tensors is None else tensors, directory / "model.safetensors",
              {"format": "pt"})
    return directory


def make_tokenizer(merges: int = 2) -> Tokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pairs = [(letters[40], letters[41 + i]) for i in range(merges)]
    ids = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs), END_OF_TEXT])}
    return Gpt2Bpe(json.dumps(ids).encode(), "\n".join(f"{a} {b}" for a, b in pairs).encode())


def make_recipe(**sections) -> Recipe:
    values = {"output": "run", "model": MODEL,
              "train": {"tokens": 1000, "global_batch": 4, "micro_batch": 1},
              "optimizer": {"lr": 1e-3}}
    for name, change in sections.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return Recipe.model_validate(values)
