"""Weights and optimizer state of ranks that show every parameter whole, as sharded tensors of the
same form as the Megatron engine's: an engine of plain PyTorch has them so, and DeepSpeed's
accessors give them so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from megatron_spdf.engine.common import model_metadata, start_state, tensors_only
from megatron_spdf.engine.state import share_replicas, snapshot
from megatron_spdf.layers.compact import compact_of, sparse_modules
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.recipe.recipe import Recipe


class WholeState:
    """The state of a model, parameter by parameter; see `base.ParameterState`.

    Args:
        model: as built: where each of its parameters belongs in a checkpoint is noted then.
        recipe: names the state.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.model, self._recipe, self.names = model, recipe, recipe.saved
        names = {id(p): name for name, p in model.named_parameters()}
        sharded = tensors_only(model.sharded_state_dict(metadata=model_metadata()))
        self._parameters = {names[id(s.data)]: s.without_data() for s in sharded.values()
                            if id(s.data) in names}
        self._buffers = {key: s.without_data() for key,
                         s in sharded.items() if id(s.data) not in names}

    def attach(self, inner: torch.optim.Optimizer, owners: dict[nn.Parameter, Tensor],
               flat: Sequence[Tensor] = ()) -> None:
        """Takes PyTorch's optimizer once it is made.

        Args:
            owners: parameter -> its whole fp32 master, the parameter itself or a copy.
            flat: masters of a sharding engine, which has no whole ones.

        Attributes:
            masters: the fp32 tensors that are updated; their state is there from here on.
        """
        self._inner, self._owners = inner, owners
        self.masters = list(flat or owners.values())
        start_state(self._recipe, inner, self.masters)

    @torch.no_grad()
    def to_save(self) -> dict:
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
            place, whole = weights[name], {key: self._read(parameter, key) for key in self.names}
            device = "cpu" if is_main_replica(place.replica_id) else "meta"
            whole = {key: t.to(device, torch.float32, copy=True) for key, t in whole.items()}
            place.data = whole[MASTER].to(place.dtype, copy=True)
            optimizer[name] = _optimizer_places(place, whole)
        return {"model": state, "optimizer": optimizer}

    def to_load(self) -> dict:
        """Sharded tensors for `load`, to be filled from a checkpoint: mask bits and optimizer
        state, whose master weights determine the weights."""
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
        for module in sparse_modules(self.model):
            compact_of(module).take_loaded()
        for name, parameter in self.model.named_parameters():
            for key in self.names:
                self.put(parameter, key, loaded["optimizer"][name][key])
        self._recipe.optimizer.set_steps(self._inner, steps)
        self.settle()

    @torch.no_grad()
    def whole(self, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter in self.model.parameters():
            yield parameter, self._read(parameter, name)

    def _mask_bits(self) -> dict[str, ShardedTensor]:
        buffers = dict(self.model.named_buffers())
        return {key: _filled(place, buffers[key]) for key, place in self._buffers.items()}

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        self._read(parameter, name).copy_(value)

    @torch.no_grad()
    def settle(self) -> None:
        for parameter, master in self._owners.items():
            parameter.copy_(master)

    def _read(self, parameter: nn.Parameter, name: str) -> Tensor:
        master = self._owners[parameter]
        return (master if name == MASTER else self._inner.state[master][name]).detach()


def _filled(place: ShardedTensor, data: Tensor) -> ShardedTensor:
    return replace(place, data=data)


def _optimizer_places(place: ShardedTensor, tensors: dict[str, Tensor]) -> dict[str, ShardedTensor]:
    return {k: make_sharded_optimizer_tensor(place, t, f"optimizer.state.{k}") for k,
            t in tensors.items()}
