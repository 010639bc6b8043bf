"""What runs on the ranks of test_family_runs.py."""

from __future__ import annotations

import cases
import torch
from plain_gpt2 import train_plain


def trained(recipe: dict, steps: int, ids: torch.Tensor, greedy: int = 0) -> dict:
    """Logits of a run that was restored and the first half of a row with the `greedy` likeliest
    tokens after it, where Megatron-Core runs it, and the curve of its steps after that."""
    with cases.bench(recipe) as b:
        b.checkpointer.restore(b.engine)
        logits, text = None, ids[:1, : ids.size(1) // 2]
        if b.recipe.engine == "megatron":
            logits = cases.logits(b.engine, ids)
            for _ in range(greedy):
                text = torch.cat([text, cases.next_token(b, cases.logits(b.engine, text))], dim=1)
        return {"logits": logits, "text": text, "curve": b.steps(0, steps)}


def plain(recipe: dict, steps: int, directory: str) -> list[tuple[float, float]]:
    """The curve of transformers' model in a directory under plain PyTorch, on the recipe's
    batches. Its zeros are held."""
    from transformers import AutoModelForCausalLM

    with cases.bench(recipe) as b:
        batches = [batch for _, batch in zip(range(steps), b.data.training_batches(0),
                                             strict=False)]
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        return train_plain(model.train(), b.recipe, batches)
