"""Optimizer state of either ZeRO stage as sharded tensors of one form: parameter -> master weight, moments.

Megatron-Core's own `sharded_state_dict` of the optimizers adds pickled parameter groups and, without Transformer
Engine or Apex, loses torch AdamW's step count on resume (every parameter is given one shared step tensor). Learning
rate and weight decay follow from the recipe and the step count from the run's state, so tensors are all we keep.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state(optimizer: MegatronOptimizer, models: list[nn.Module], model_state: dict, loading: bool) -> dict:
    """Sharded master weights and moments of all parameters of this rank.

    Args:
        model_state: the models' sharded tensors, chunk name -> key -> ShardedTensor.
        loading: whether to make place for a checkpoint's state instead of giving out ours.
    """
    (inner,) = optimizer.chained_optimizers
    inner.init_state_fn(inner.optimizer, inner.config)  # moments exist from the first step on only
    if isinstance(inner, DistributedOptimizer):
        return inner.sharded_param_state_fully_reshardable(model_state, is_loading=loading, metadata={})
    sharded = {id(s.data): s for chunk in model_state.values() for s in chunk.values() if isinstance(s, ShardedTensor)}
    state = {}
    for number, parameter in enumerate(_parameters(models)):
        main = getattr(parameter, "main_param", parameter)
        tensors = {"param": main, **{m: inner.optimizer.state[main][m] for m in MOMENTS}}
        state[number] = {k: make_sharded_optimizer_tensor(sharded[id(parameter)], t.detach(), f"optimizer.state.{k}")
                         for k, t in tensors.items()}
    return state


@torch.no_grad()
def load_optimizer(optimizer: MegatronOptimizer, models: list[nn.Module], loaded: dict, steps: int) -> None:
    """Puts loaded master weights and moments in place and sets Adam's step count."""
    (inner,) = optimizer.chained_optimizers
    if isinstance(inner, DistributedOptimizer):
        for state in inner.optimizer.state.values():
            state.pop("step", None)  # not among the loaded tensors, which must be complete; set below
        inner.load_parameter_state_from_fully_reshardable(loaded)
    else:
        for number, parameter in enumerate(_parameters(models)):
            main = getattr(parameter, "main_param", parameter)
            main.copy_(loaded[number]["param"])
            for moment in MOMENTS:
                inner.optimizer.state[main][moment].copy_(loaded[number][moment])
    _set_step(inner.optimizer, steps)


def _set_step(adam: torch.optim.Optimizer, steps: int) -> None:
    """Torch's AdamW counts per parameter, the fused ones of Apex and Transformer Engine per group."""
    if isinstance(adam, torch.optim.AdamW):
        for state in adam.state.values():
            state["step"] = torch.tensor(float(steps))
    else:
        for group in adam.param_groups:
            group["step"] = steps


def _parameters(models: list[nn.Module]) -> list[nn.Parameter]:
    return [p for model in models for p in model.parameters() if p.requires_grad]
