"""AdamW with a step count for every value, by its definition on dense weights."""

from __future__ import annotations

import torch
from plain_gpt2 import decayed


class AgedAdamW(torch.optim.Optimizer):
    """Bias correction by a value's own age, or the usual one with updates that grow over `ramp`
    steps of those that were born later.

    Args:
        model: whose parameters it updates.
        recipe: with the fields of Adam, and what becomes of newborn values.
    """

    def __init__(self, model: torch.nn.Module, recipe):
        super().__init__(decayed(model, recipe.optimizer).param_groups, {})
        self.settings, self.update, self.steps = recipe.optimizer, recipe.sparsity.update, 0
        for p in model.parameters():
            self.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq", "age")}

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["age"] += 1
                p -= group["lr"] * (self._direction(p.grad, **state) + group["weight_decay"] * p)

    def _direction(self, grad, exp_avg, exp_avg_sq, age) -> torch.Tensor:
        o, counts, growth = self.settings, age.double(), 1.0
        if self.update.newborn == "ramp":
            growth = (counts / self.update.ramp).clamp(max=1.0)
            growth[age == self.steps] = 1.0
            counts = torch.full_like(counts, self.steps)
        exp_avg += (1 - o.beta1) * (grad - exp_avg)
        exp_avg_sq += (1 - o.beta2) * (grad**2 - exp_avg_sq)
        first, second = exp_avg / (1 - o.beta1**counts), exp_avg_sq / (1 - o.beta2**counts)
        return (growth * first / (second.sqrt() + o.eps)).float()
