"""What runs on the ranks of test_optimizer.py."""

from __future__ import annotations

import torch
from cases import bench
from plain_gpt2 import plain_gpt2, train_plain


def plain(recipe: dict, steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of transformers' GPT-2 under PyTorch's SGD, masks multiplied in."""
    with bench(recipe) as b:
        batches = [batch for _, batch in zip(range(steps), b.data.training_batches(0),
                                             strict=False)]
        return train_plain(plain_gpt2(b.engine.models[0], b.recipe), b.recipe, batches, _sgd)


def put_back(recipe: dict) -> dict:
    """Two steps, twice: before the second time all state is set to what it was at the start."""
    with bench(recipe) as b:
        state, batch = b.engine.state, next(b.data.validation_batches())
        before = {name: [t.cpu().clone() for _, t in state.whole(name)] for name in state.names}
        fresh, curve = b.engine.evaluate(batch, False), b.steps(0, 2)
        trained = b.engine.evaluate(batch, False)
        for name in state.names:
            parameters = [p for p, _ in state.whole(name)]
            for parameter, value in zip(parameters, before[name], strict=True):
                state.put(parameter, name, value)
        state.settle()
        same = [torch.equal(t, value) for name in state.names
                for (_, t), value in zip(state.whole(name), before[name], strict=True)]
        return {"same": all(same), "losses": (fresh, trained, b.engine.evaluate(batch, False)),
                "curves": (curve, b.steps(0, 2))}


def _sgd(groups: list[dict], o) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=1.0, momentum=o.momentum)
