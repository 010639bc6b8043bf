"""An independent reference: transformers' GPT-2, trained by plain PyTorch with masks multiplied
into the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def plain_gpt2(model, recipe) -> nn.Module:
    """transformers' GPT-2 with the weights of a Megatron-Core GPT that one rank holds."""
    from transformers import GPT2Config, GPT2LMHeadModel

    m = recipe.model
    weights = {n: p for n, p in model.named_parameters() if "parametrizations" not in n}
    modules = dict(model.named_modules())
    config = GPT2Config(vocab_size=m.vocab_size, n_positions=m.max_positions, n_embd=m.hidden,
                        n_layer=m.layers, n_head=m.heads, n_inner=m.ffn_hidden, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0)
    reference = GPT2LMHeadModel(config)

    def linear(name: str, target, order=None) -> None:
        weight, bias = modules[name].weight.detach(), weights[f"{name}.bias"].detach()
        if order is not None:
            weight, bias = weight[order], bias[order]
        target.weight.data.copy_(weight.T)  # transformers' Conv1D is (in, out)
        target.bias.data.copy_(bias)

    def norm(name: str, target) -> None:
        target.weight.data.copy_(weights[f"{name}.weight"])
        target.bias.data.copy_(weights[f"{name}.bias"])

    gpt = reference.transformer
    gpt.wte.weight.data.copy_(weights["embedding.word_embeddings.weight"][: m.vocab_size])
    gpt.wpe.weight.data.copy_(weights["embedding.position_embeddings.weight"])
    for i, block in enumerate(gpt.h):
        at = f"decoder.layers.{i}."
        norm(at + "input_layernorm", block.ln_1)
        linear(at + "self_attention.linear_qkv", block.attn.c_attn, qkv_order(m))
        linear(at + "self_attention.linear_proj", block.attn.c_proj)
        norm(at + "pre_mlp_layernorm", block.ln_2)
        linear(at + "mlp.linear_fc1", block.mlp.c_fc)
        linear(at + "mlp.linear_fc2", block.mlp.c_proj)
    norm("decoder.final_layernorm", gpt.ln_f)
    return reference


def qkv_order(m) -> Tensor:
    """Rows of Megatron-Core's fused weight (head 0: q, k, v; head 1: ...) in the order of GPT-2's
    (q; k; v)."""
    head = m.hidden // m.heads
    return torch.arange(3 * m.hidden).view(m.heads, 3, head).transpose(0, 1).reshape(-1)


def linear_weight(reference, name: str) -> torch.nn.Parameter:
    """A linear weight of transformers' GPT-2 by its canonical name, (in, out)."""
    _, _, layer, _, linear, _ = name.split(".")
    block = reference.transformer.h[int(layer)]
    return {"linear_qkv": block.attn.c_attn, "linear_proj": block.attn.c_proj,
            "linear_fc1": block.mlp.c_fc, "linear_fc2": block.mlp.c_proj}[linear].weight


def as_theirs(m, name: str, ours: Tensor) -> Tensor:
    """A weight (out, in) of Megatron-Core, or its mask, as GPT-2 lays it out, (in, out)."""
    return (ours[qkv_order(m)] if "linear_qkv" in name else ours).T


def as_ours(m, name: str, theirs: Tensor) -> Tensor:
    """A weight (in, out) of GPT-2, or its gradient, as Megatron-Core lays it out, (out, in)."""
    return theirs.T[qkv_order(m).argsort()] if "linear_qkv" in name else theirs.T


def decayed(model: torch.nn.Module, o) -> torch.optim.AdamW:
    """AdamW as the recipe's section says, with weight decay on what has two axes."""
    return adamw([{"params": [p for p in model.parameters() if (p.ndim > 1) == decays],
                   "weight_decay": o.weight_decay * decays} for decays in (True, False)], o)


def adamw(groups: list[dict], o) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)


def train_plain(reference: nn.Module, recipe, steps: list[list[dict]],
                build=adamw) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step, weights that start at exactly zero in the layers held
    there.

    Args:
        build: makes the optimizer of parameter groups and the recipe's section.
    """
    o = recipe.optimizer
    masks = {n: p != 0 for n, p in reference.named_parameters()
             if p.ndim == 2 and (".h." in n or ".layers." in n)}
    groups = [{"params": [p for p in reference.parameters() if p.ndim > 1],
               "weight_decay": o.weight_decay},
              {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = build(groups, o)
    curve = []
    for number, batch in enumerate(steps, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, number * recipe.tokens_per_step)
        optimizer.zero_grad()
        loss = sum(micro_loss(reference, micro) for micro in batch) / len(batch)
        loss.backward()
        for name, parameter in reference.named_parameters():
            if name in masks:
                parameter.grad *= masks[name]
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), o.clip_grad)
        optimizer.step()
        curve.append((float(loss), float(norm)))
    return curve


def micro_loss(reference: nn.Module, micro: dict) -> Tensor:
    logits = reference(micro["tokens"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro["labels"].flatten())


def learning_rate(recipe, tokens: int) -> float:
    o, total = recipe.optimizer, recipe.steps * recipe.tokens_per_step
    if tokens <= o.warmup_tokens:
        return o.lr * tokens / o.warmup_tokens
    done = (tokens - o.warmup_tokens) / (total - o.warmup_tokens)
    return o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
