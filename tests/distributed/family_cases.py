"""What runs on the ranks of test_family_runs.py."""

from __future__ import annotations

import cases
import torch
from plain_gpt2 import train_plain


def trained(recipe: dict, steps: int, ids: torch.Tensor) -> dict:
    """Logits of a run that was restored, where Megatron-Core runs it, and the curve of its steps
    after that."""
    with cases.bench(recipe) as b:
        b.checkpointer.restore(b.engine)
        logits = None if b.recipe.engine == "deepspeed" else cases.logits(b.engine, ids)
        return {"logits": logits, "curve": b.steps(0, steps)}


def plain(recipe: dict, steps: int, directory: str) -> list[tuple[float, float]]:
    """The curve of transformers' model in a directory under plain PyTorch, on the recipe's
    batches. Its zeros are held."""
    from transformers import AutoModelForCausalLM

    with cases.bench(recipe) as b:
        batches = [batch for _, batch in zip(range(steps), b.data.training_batches(0),
                                             strict=False)]
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        return train_plain(model.train(), b.recipe, batches)
