"""Where releases of Megatron-Core differ: 0.16, the last for Python 3.11, and 0.19, which needs
3.12."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """The main gradients of this rank that count in the global norm: each of the model's once over
    all ranks."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # from 0.19 on
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
