"""Master weights and named state under DeepSpeed's ZeRO.

DeepSpeed's own checkpoints are pickles bound to one ZeRO stage and layout. Through its accessors of
whole parameters and states, one parameter at a time, they become the checkpoints that every other
part of this project knows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_spdf.engine.whole_state import WholeState
from megatron_spdf.optimizers.base import MASTER


class ZeroState(WholeState):
    """The state of a model that DeepSpeed may shard, of which every rank gathers one parameter at a
    time."""

    def attach(self, inner: torch.optim.Optimizer, optimizer) -> None:
        """Takes PyTorch's optimizer, and DeepSpeed's around it, once that is made."""
        self._optimizer, flat = optimizer, _flat_masters(optimizer)
        super().attach(inner, {} if flat else _whole_masters(optimizer, self.model), flat)
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _read(self, parameter: nn.Parameter, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if parameter in self._owners:
            return super()._read(parameter, name)
        if name == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, name)

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if parameter in self._owners:
            super().put(parameter, name, value)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3; its setter of whole values forgets the padding
            value = _own_part(parameter, value)
            if name == MASTER:
                safe_set_local_fp32_param(parameter, value)
            else:
                safe_set_local_optimizer_state(parameter, value, name)
        elif name == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, name)

    @torch.no_grad()
    def settle(self) -> None:
        super().settle()
        optimizer = self._optimizer
        if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
            optimizer.update_lp_params()
        elif not self._owners:  # ZeRO-3
            for number in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if optimizer.persistent_parameters:  # small ones that are kept whole
                kept = optimizer.persistent_parameters
                kept[0].partition(kept)  # who has them whole already would gather nothing
                kept[0].all_gather(kept)


def _whole_masters(optimizer, model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Parameter -> its fp32 master where ZeRO shards nothing: the parameter itself, or a copy of it
    under bf16."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return {p: p for p in model.parameters()}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: master for group, masters in groups for p,
            master in zip(group, masters, strict=True)}


def _flat_masters(optimizer) -> list[Tensor]:
    """This rank's flat partitions of the fp32 masters; none where ZeRO shards nothing."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition",
                 "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def _own_part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's share of a whole value under ZeRO-3, padded as DeepSpeed pads it."""
    group, size = parameter.ds_process_group, parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(group), dtype=value.dtype)
    padded[: value.numel()] = value.flatten()
    return padded.narrow(0, size * dist.get_rank(group), size)


