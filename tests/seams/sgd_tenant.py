"""An optimizer of our own in one file: SGD with momentum."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from megatron_spdf.optimizers.base import OPTIMIZERS, Optimizer


class Sgd(Optimizer):
    """SGD with momentum; weight decay is added to the gradient."""

    states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    title: ClassVar[str] = "SGD"

    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the sum of gradients")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.SGD:
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum,
                               weight_decay=self.weight_decay)

    def mup_rate(self, linear: bool, width: float, growth: float) -> float:
        """Table 3 of Yang et al. 2021 (arXiv 2203.03466): 1 for linear weights, over their density
        where they are sparse; the width for embeddings and vectors."""
        return width / growth


OPTIMIZERS.register("sgd", Sgd)
