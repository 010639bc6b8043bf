"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from megatron_spdf.optimizers.base import OPTIMIZERS, Average, Optimizer

if TYPE_CHECKING:
    import torch


class AdamW(Optimizer):
    """AdamW; linear warm-up, then decay to lr x min_lr_ratio; weight decay is decoupled."""

    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    title: ClassVar[str] = "AdamW"

    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0.0, lt=1.0, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0.0, description="added to the root of the second moment")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        import torch

        return torch.optim.AdamW(groups, lr=0.0, betas=(self.beta1, self.beta2), eps=self.eps,
                                 weight_decay=self.weight_decay, fused=True)

    def megatron_options(self) -> dict[str, Any]:
        return {"optimizer": "adam", "adam_beta1": self.beta1, "adam_beta2": self.beta2,
                "adam_eps": self.eps}

    def deepspeed_options(self) -> dict[str, tuple[str, Any]]:
        betas = ("[optimizer.beta1, optimizer.beta2]", [self.beta1, self.beta2])
        return {**super().deepspeed_options(), "params.betas": betas,
                "params.eps": ("optimizer.eps", self.eps)}

    def start(self, optimizer, masters) -> None:
        import torch

        # Without Transformer Engine and Apex, Megatron-Core takes PyTorch's and cannot be told to
        # fuse it.
        if isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:
                group["fused"] = True
        super().start(optimizer, masters)

    def set_steps(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Bias correction goes by the count: PyTorch's has one for each parameter, those of Apex
        and Transformer Engine one for each group."""
        import torch

        if isinstance(optimizer, torch.optim.AdamW):
            for state in optimizer.state.values():
                state["step"] = torch.full((), float(steps), device=state["exp_avg"].device)
        else:
            for group in optimizer.param_groups:
                group["step"] = steps

    def skips_on_device(self, optimizer: torch.optim.Optimizer) -> bool:
        import torch

        return isinstance(optimizer, torch.optim.AdamW) and all(
            group["fused"] for group in optimizer.param_groups)

    @property
    def averages(self) -> dict[str, Average]:
        return {"exp_avg": Average(self.beta1, 1), "exp_avg_sq": Average(self.beta2, 2)}

    @property
    def largest_first_updates(self) -> float:
        """Both moments grow from zero as 1 - beta^t, the second slower, and an old step count
        corrects neither."""
        return _largest_first_updates(self.beta1, self.beta2)

    def mup_rate(self, linear: bool, width: float, growth: float) -> float:
        return 1.0 / growth


@cache  # a recipe is asked in every step what its newborn weights do
def _largest_first_updates(beta1: float, beta2: float) -> float:
    return max((1.0 - beta1**t) / math.sqrt(1.0 - beta2**t) for t in range(1, 1000))


OPTIMIZERS.register("adamw", AdamW)
