"""GPT-2s made by transformers itself, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

# layers, hidden, heads, ffn_hidden, vocab_size, max_positions
SHAPES = {
    "narrow": (4, 64, 4, 192, 301, 32),
    "twelve heads of 64": (1, 768, 12, 3072, 301, 32),
    "odd vocabulary": (2, 48, 12, 192, 50257, 16),
    "three heads": (3, 48, 3, 96, 97, 8),
    "one head": (1, 8, 1, 24, 131, 12),
}
KEYS = ("layers", "hidden", "heads", "ffn_hidden", "vocab_size", "max_positions")


def shape_of(name: str) -> dict[str, int]:
    """A recipe's model section."""
    return dict(zip(KEYS, SHAPES[name], strict=True))


def make_gpt2(name: str, seed: int = 0, **config):
    """A GPT2LMHeadModel of that shape; biases and norms are random too, so that none can be left
    out unnoticed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, hidden, heads, inner, vocabulary, positions = SHAPES[name]
    torch.manual_seed(seed)
    end = vocabulary - 1
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=hidden, n_layer=layers, n_head=heads,
        n_inner=None if inner == 4 * hidden else inner, bos_token_id=end, eos_token_id=end,
        **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def make_talkative_gpt2(tokenizer, positions: int):
    """A GPT2LMHeadModel that says many tokens, also such as are parts of characters; some rows
    belong to no token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=tokenizer.vocab_size + 7, n_positions=positions, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=tokenizer.eod, eos_token_id=tokenizer.eod, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def save_gpt2(name: str, directory: Path, **arguments) -> Path:
    make_gpt2(name).save_pretrained(directory, **arguments)
    return directory


@torch.no_grad()
def logits_of(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, vocabulary), in float32."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    return model.eval()(ids).logits
