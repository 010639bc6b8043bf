"""A checkpoint as a Hugging Face model: GPT-2's architecture, dense weights with zeros, no code of ours to load it.

    AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.reader import CheckpointReader
from megatron_spdf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.model.weights import EMBEDDING

WEIGHTS, CARD = "model.safetensors", "README.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORMAT = {torch.float32: "F32", torch.bfloat16: "BF16"}  # safetensors' names
_MODEL = {EMBEDDING: "wte.weight", "embedding.position_embeddings.weight": "wpe.weight",
          "decoder.final_layernorm.weight": "ln_f.weight", "decoder.final_layernorm.bias": "ln_f.bias"}
_BLOCK = {"input_layernorm": "ln_1", "self_attention.linear_qkv": "attn.c_attn",
          "self_attention.linear_proj": "attn.c_proj", "pre_mlp_layernorm": "ln_2", "mlp.linear_fc1": "mlp.c_fc",
          "mlp.linear_fc2": "mlp.c_proj"}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the exported model: its name and shape there, and how to obtain it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def export(reader: CheckpointReader, output: Path, dtype: str = "fp32") -> None:
    """Writes the checkpoint as a directory that `transformers` loads; it appears complete or not at all.

    One weight at a time is dense in memory.

    Args:
        output: must not exist.
        dtype: "fp32" or "bf16", of the weights in the file.

    Raises:
        ValueError: `output` exists, or GPT-2's architecture or tokenizers cannot express the model's.
        DamagedCheckpoint: a weight is missing or not what the recipe says.
    """
    tokenizer = _check(reader, output)
    partial = output.with_name(output.name + store.PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _save_tokenizer(tokenizer, reader, partial)
        _save_config(tokenizer, reader, dtype, partial)
        (partial / CARD).write_text(model_card(reader, dtype))
        _save_tensors(_tensors(reader), DTYPES[dtype], partial / WEIGHTS)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    store.sync_directory(output.parent)


def _check(reader: CheckpointReader, output: Path) -> Tokenizer:
    """The checkpoint's tokenizer, where all can be exported."""
    model, kind = reader.recipe.model, reader.run["tokenizer"]["kind"]
    if output.exists():
        raise ValueError(f"{output} exists; give a new directory")
    if model.query_groups != model.heads:
        raise ValueError(f"model.query_groups={model.query_groups} and model.heads={model.heads}: in GPT-2's "
                         "architecture every head has a key and a value of its own, so only a model with as many "
                         "query groups as heads can be exported")
    if kind == "sentencepiece":
        raise ValueError("a SentencePiece tokenizer cannot be exported yet; gpt2-bpe and tokenizers can")
    return load_tokenizer(reader.path / "tokenizer")


def _tensors(reader: CheckpointReader) -> Iterator[_Tensor]:
    """All tensors of the exported model; the tied LM head is the embedding and not listed again."""
    model = reader.recipe.model
    for name, weight in reader.weights.items():
        place, shape, order = _place(name), weight.shape, None
        if name == EMBEDDING:  # without the rows that pad the vocabulary
            shape, order = (model.vocab_size, model.hidden), slice(model.vocab_size)
        elif ".linear_qkv." in name:
            order = _qkv_order(model.heads, model.hidden // model.heads)
        if weight.linear:
            shape = shape[::-1]
        yield _Tensor(place, shape, lambda n=name, o=order, t=weight.linear: _read(reader, n, o, t))


def _read(reader: CheckpointReader, name: str, order: Tensor | slice | None, transposed: bool) -> Tensor:
    tensor = reader.weight(name)
    tensor = tensor if order is None else tensor[order]
    return tensor.T if transposed else tensor  # GPT-2's linear weights are (in, out)


def _place(name: str) -> str:
    """GPT-2's name of the parameter with this canonical name."""
    if name in _MODEL:
        return f"transformer.{_MODEL[name]}"
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    module, parameter = rest.rsplit(".", 1)
    return f"transformer.h.{layer}.{_BLOCK[module]}.{parameter}"


def _qkv_order(heads: int, head: int) -> Tensor:
    """Rows of the fused weight, (head 0: q, k, v; head 1: ...), in GPT-2's order: (q; k; v) of all heads."""
    return torch.arange(3 * heads * head).view(heads, 3, head).transpose(0, 1).flatten()


def _save_tensors(tensors: Iterator[_Tensor], dtype: torch.dtype, path: Path) -> None:
    """The safetensors format, written tensor by tensor; its library wants all of them in memory."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": _FORMAT[dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.read().to(dtype).contiguous()
            assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
            file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _save_tokenizer(tokenizer: Tokenizer, reader: CheckpointReader, directory: Path) -> None:
    end = tokenizer.decode([tokenizer.eod])
    tokenizer.save(directory)  # first, to an empty directory
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end,
              "model_max_length": reader.recipe.model.max_positions, "clean_up_tokenization_spaces": False}
    if tokenizer.kind == "gpt2-bpe":
        config |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": end, "add_prefix_space": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _save_config(tokenizer: Tokenizer, reader: CheckpointReader, dtype: str, directory: Path) -> None:
    from transformers import GenerationConfig, GPT2Config

    m, end = reader.recipe.model, tokenizer.eod
    GPT2Config(
        vocab_size=m.vocab_size, n_positions=m.max_positions, n_embd=m.hidden, n_layer=m.layers, n_head=m.heads,
        n_inner=m.ffn_hidden, activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
        resid_pdrop=m.dropout, embd_pdrop=m.dropout, attn_pdrop=m.dropout, bos_token_id=end, eos_token_id=end,
        architectures=["GPT2LMHeadModel"], dtype=DTYPES[dtype],
    ).save_pretrained(directory)
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(directory)


def model_card(reader: CheckpointReader, dtype: str) -> str:
    """README.md of the exported model: what it is, how it was made, how to load it."""
    run, plan, recipe = reader.run, reader.plan, reader.recipe
    parameters = sum(w.numel for w in reader.weights.values())
    sparsity = f"{plan.sparsity:.2%} of the {plan.numel:,} weights in {len(plan.weights)} matrices of the blocks are " \
               f"exactly zero (static random masks, seed {plan.seed})" if plan.weights else "none, the model is dense"
    kept = recipe.model_dump(include={"seed", "model", "sparsity", "train", "optimizer"})
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, sparse]
---
# GPT, {recipe.model.layers} layers x {recipe.model.hidden}

Pre-trained with megatron_spdf (sparse pre-training, dense fine-tuning, https://arxiv.org/abs/2303.10464).

- Architecture: GPT-2, tied embeddings, {parameters:,} parameters, of which {parameters - plan.numel + plan.active:,} \
active (counted with the padding of the vocabulary, which is cut off here).
- Sparsity: {sparsity}. The weights are stored dense, zeros included.
- Training: step {run["state"]["step"]:,}, {run["tokens"]:,} tokens; saved {run["saved"]}.
- Weights: {dtype}, trained in {recipe.train.precision}. Written by {versions}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this directory")
tokenizer = AutoTokenizer.from_pretrained("this directory")
```

## Recipe

```yaml
{yaml.safe_dump(kept, sort_keys=False).strip()}
```
"""
