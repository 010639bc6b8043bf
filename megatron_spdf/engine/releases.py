"""Where releases of Megatron-Core differ: 0.16, the last for Python 3.11, and 0.19, for 3.12."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def gradients_for_norm(optimizer: MegatronOptimizer) -> list[Tensor]:
    """This rank's share of the gradients in the global norm, each once over all ranks."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # 0.19
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
