"""What runs on the ranks of test_optimizer.py, which know the optimizer of sgd_tenant.py."""

from __future__ import annotations

import sgd_tenant  # noqa: F401
import torch
from cases import bench, cut, train
from plain_gpt2 import plain_gpt2, train_plain

__all__ = ["cut", "plain", "train"]


def plain(recipe: dict, steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of transformers' GPT-2 under PyTorch's SGD, masks multiplied in."""
    with bench(recipe) as b:
        batches = [batch for _, batch in zip(range(steps), b.data.training_batches(0),
                                             strict=False)]
        return train_plain(plain_gpt2(b.engine.models[0], b.recipe), b.recipe, batches, _sgd)


def _sgd(groups: list[dict], o) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=1.0, momentum=o.momentum)
