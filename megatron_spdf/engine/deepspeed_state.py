"""Weights and optimizer state under DeepSpeed's ZeRO as sharded tensors, of the same form as the
Megatron engine's.

DeepSpeed's own checkpoints are pickles bound to one ZeRO stage and layout. Through its accessors of
whole parameters and moments, one parameter at a time, they become the checkpoints that every other
part of this project knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from megatron_spdf.engine.common import model_metadata, tensors_only
from megatron_spdf.engine.state import share_replicas, snapshot
from megatron_spdf.optimizers.base import MASTER, Optimizer


class ZeroState:
    """The state of a model under ZeRO, parameter by parameter; see `base.ParameterState`.

    Args:
        model: before DeepSpeed cuts its parameters up; where each belongs in a checkpoint is noted
            then.
        settings: the section of the recipe, which names the state.
    """

    def __init__(self, model: nn.Module, settings: Optimizer):
        self.model, self._settings, self.names = model, settings, settings.saved
        names = {id(p): name for name, p in model.named_parameters()}
        sharded = tensors_only(model.sharded_state_dict(metadata=model_metadata()))
        self._parameters = {names[id(s.data)]: s.without_data() for s in sharded.values()
                            if id(s.data) in names}
        self._buffers = {key: s.without_data() for key,
                         s in sharded.items() if id(s.data) not in names}

    def attach(self, optimizer, inner: torch.optim.Optimizer) -> ZeroState:
        """Takes DeepSpeed's optimizer, and PyTorch's in it, once it is made.

        Attributes:
            masters: the flat or whole fp32 tensors that are updated; their state is there from here
                on.
        """
        self._optimizer, self._inner = optimizer, inner
        self.masters = _flat_masters(optimizer)
        self._owners = {} if self.masters else _whole_masters(optimizer, self.model)
        self.masters = self.masters or list(self._owners.values())
        self._settings.start(inner, self.masters)
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._lazy_init_hp_params_optimizer_state()
        return self

    @torch.no_grad()
    def shards(self) -> dict:
        """Weights, mask bits and optimizer state, copies on the CPU of what this rank saves;
        gathered from the data-parallel ranks one parameter at a time."""
        weights = {name: _filled(place,
                                 torch.empty(place.local_shape, dtype=place.dtype, device="meta"))
                   for name, place in self._parameters.items()}
        state, optimizer = {"weights": weights, "masks": self._mask_bits()}, {}
        group = ps.get_data_parallel_group()
        share_replicas(state, group.rank(), group.size())
        snapshot({"masks": state["masks"]})
        for name, parameter in self.model.named_parameters():
            place, whole = weights[name], {key: self._whole(parameter, key) for key in self.names}
            device = "cpu" if is_main_replica(place.replica_id) else "meta"
            whole = {key: t.to(device, torch.float32, copy=True) for key, t in whole.items()}
            place.data = whole[MASTER].to(place.dtype, copy=True)
            optimizer[name] = _optimizer_places(place, whole)
        return {"model": state, "optimizer": optimizer}

    def places(self) -> dict:
        """What `load` wants, to be filled: mask bits and optimizer state, of which the master
        weights determine the weights."""
        optimizer = {
            name: _optimizer_places(place, {k: torch.empty(place.local_shape) for k in self.names})
            for name, place in self._parameters.items()}
        return {"masks": self._mask_bits(), "optimizer": optimizer}

    @torch.no_grad()
    def load(self, loaded: dict, steps: int) -> None:
        """Puts master weights and named state in place, sets the number of updates done, and casts
        the weights anew."""
        buffers = dict(self.model.named_buffers())
        # a dense model has none, and empty parts are not kept
        for key, bits in loaded.get("masks", {}).items():
            buffers[key].copy_(bits)
        for name, parameter in self.model.named_parameters():
            for key in self.names:
                self.put(parameter, key, loaded["optimizer"][name][key])
        self._settings.set_steps(self._inner, steps)
        self.settle()

    @torch.no_grad()
    def whole(self, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in self.model.parameters():
            yield parameter, self._whole(parameter, name)

    def _mask_bits(self) -> dict[str, ShardedTensor]:
        buffers = dict(self.model.named_buffers())
        return {key: _filled(place, buffers[key]) for key, place in self._buffers.items()}

    def _whole(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if parameter in self._owners:
            master = self._owners[parameter]
            return (master if key == MASTER else self._inner.state[master][key]).detach()
        if key == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if parameter in self._owners:
            self._whole(parameter, key).copy_(value)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3; its setter of whole values forgets the padding
            value = _own_part(parameter, value)
            if key == MASTER:
                safe_set_local_fp32_param(parameter, value)
            else:
                safe_set_local_optimizer_state(parameter, value, key)
        elif key == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    @torch.no_grad()
    def settle(self) -> None:
        """The weights that the model computes with, from their masters."""
        optimizer = self._optimizer
        for parameter, master in self._owners.items():
            parameter.copy_(master)
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


def _filled(place: ShardedTensor, data: Tensor) -> ShardedTensor:
    return replace(place, data=data)


def _optimizer_places(place: ShardedTensor, tensors: dict[str, Tensor]) -> dict[str, ShardedTensor]:
    return {k: make_sharded_optimizer_tensor(place, t, f"optimizer.state.{k}") for k,
            t in tensors.items()}
