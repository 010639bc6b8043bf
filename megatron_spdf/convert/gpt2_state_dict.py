"""GPT-2's form of the weights in `transformers`: its names, transposed linear layers, (q; k; v) in
one piece.

The vocabulary has no padding there, and the tied LM head is the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_spdf.architecture.base import EMBEDDING, Model, Weight

PREFIX = "transformer."  # of every name in GPT2LMHeadModel
_MODEL = {EMBEDDING: "wte.weight", "embedding.position_embeddings.weight": "wpe.weight",
          "decoder.final_layernorm.weight": "ln_f.weight",
          "decoder.final_layernorm.bias": "ln_f.bias"}
_BLOCK = {"input_layernorm": "ln_1", "self_attention.linear_qkv": "attn.c_attn",
          "self_attention.linear_proj": "attn.c_proj", "pre_mlp_layernorm": "ln_2",
          "mlp.linear_fc1": "mlp.c_fc",
          "mlp.linear_fc2": "mlp.c_proj"}


def gpt2_name(name: str) -> str:
    """GPT-2's name, in GPT2Model, of the parameter with this canonical name."""
    if name in _MODEL:
        return _MODEL[name]
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    module, parameter = rest.rsplit(".", 1)
    return f"h.{layer}.{_BLOCK[module]}.{parameter}"


def gpt2_shape(weight: Weight, model: Model) -> tuple[int, ...]:
    """Its shape there: without padding, linear layers (in, out)."""
    if weight.name == EMBEDDING:
        return model.vocab_size, model.hidden
    return weight.shape[::-1] if weight.linear else weight.shape


def to_gpt2(tensor: Tensor, weight: Weight, model: Model) -> Tensor:
    """A parameter, or a mask of its shape, in GPT-2's form."""
    if weight.name == EMBEDDING:
        tensor = tensor[: model.vocab_size]
    elif ".linear_qkv." in weight.name:
        tensor = tensor[_qkv_order(model)]
    return tensor.T if weight.linear else tensor


def from_gpt2(tensor: Tensor, weight: Weight, model: Model) -> Tensor:
    """A parameter from GPT-2's form, with the shape of `weight`."""
    if weight.name == EMBEDDING:
        return pad_vocabulary(tensor, weight.shape[0])
    tensor = tensor.T if weight.linear else tensor
    return tensor[torch.argsort(_qkv_order(model))] if ".linear_qkv." in weight.name else tensor


def pad_vocabulary(embedding: Tensor, rows: int) -> Tensor:
    """The embedding with `rows` rows, those past the vocabulary being the mean of it.

    Ours take no part in the softmax over the LM head, but Megatron-LM's do. Trained models have
    logits far below zero, so rows of zeros would win it. The logit of the mean row is the mean
    logit, and n such tokens have at most n / vocabulary of the others' weight, since exp(mean) <=
    mean(exp).
    """
    padding = rows - len(embedding)
    assert padding >= 0, (rows, embedding.shape)
    mean = embedding.float().mean(0, keepdim=True).to(embedding.dtype)
    return torch.cat([embedding, mean.expand(padding, -1)]) if padding else embedding


def _qkv_order(model: Model) -> Tensor:
    """Rows of the fused weight, (head 0: q, k, v; head 1: ...), in GPT-2's order: (q; k; v) of all
    heads."""
    heads, head = model.heads, model.hidden // model.heads
    return torch.arange(3 * heads * head).view(heads, 3, head).transpose(0, 1).flatten()
