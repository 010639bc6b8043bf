"""The sparsity that is there, measured on expanded weights, against the one that was planned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from megatron_spdf.layers.compact import compact_of, sparse_modules
from megatron_spdf.sparsity.plan import Plan

# An active value may be exactly zero by chance; a mask that leaks or a value that died in numbers
# is more than that.
TOLERANCE = 1e-3
SHOWN = 4  # weights that a message names, out of what may be hundreds


class SparsityDrift(RuntimeError):
    """The expanded weights are not as sparse as planned."""


@torch.no_grad()
def measure_sparsity(
    models: list[nn.Module], data_parallel_rank: int, plan: Plan,
    gathered: Callable[[nn.Parameter], AbstractContextManager] = lambda parameter: nullcontext(),
) -> dict[str, float]:
    """Fraction of zeros of every sparse weight over all ranks: canonical name -> sparsity.

    Args:
        data_parallel_rank: replicas after the first count nothing, so that every shard counts once.
        gathered: a context in which all of a parameter is there, which every rank enters.
    """
    names = list(plan.weights)
    device = next(models[0].parameters()).device
    non_zero = torch.zeros(len(names), dtype=torch.int64, device=device)
    for module in (m for model in models for m in sparse_modules(model)):
        compact, values = compact_of(module), module.parametrizations.weight.original
        with gathered(values):
            compact.choose(values)  # on every replica
            if data_parallel_rank == 0:
                # Not module.weight: under ZeRO-3 that would count as a forward pass.
                non_zero[names.index(compact.planned.name)] = torch.count_nonzero(
                    compact.forward(values)
                )
    dist.all_reduce(non_zero)
    return {n: 1.0 - count / plan.weights[n].numel for n,
            count in zip(names, non_zero.tolist(), strict=True)}


def check_sparsity(measured: dict[str, float], plan: Plan) -> None:
    """Raises SparsityDrift for weights whose sparsity is off the plan by more than a thousandth."""
    off = [f"{n}: planned {plan.weights[n].sparsity:.6f}, measured {s:.6f}"
           for n, s in measured.items() if abs(s - plan.weights[n].sparsity) > TOLERANCE]
    if off:
        others = [f"and {len(off) - SHOWN} others"] if len(off) > SHOWN else []
        raise SparsityDrift("the weights are not as sparse as planned, so the run stops before it "
                            "saves them; resume from the last checkpoint. "
                            + "; ".join([*off[:SHOWN], *others]))


def total_sparsity(measured: dict[str, float], plan: Plan) -> float:
    """Measured sparsity of all sparse weights together; 0.0 for a dense run."""
    zeros = sum(s * plan.weights[n].numel for n, s in measured.items())
    return zeros / plan.numel if plan.weights else 0.0

