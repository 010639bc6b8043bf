"""Optimizer state under Megatron-Core, with ZeRO-1 or without: parameter -> master weight and named
state, whole or as sharded tensors of one form.

Megatron-Core's own `sharded_state_dict` of the optimizers does not serve:
- without Transformer Engine or Apex it loses torch AdamW's step count on resume: every parameter is
  given one shared step tensor, and losses drift from the second step on;
- its `fully_reshardable` form drops the padding between buckets on saving and then reads with it,
  so that every bucket after a padded one is saved shifted; compact weights have such lengths;
- it adds pickled parameter groups. Learning rate and weight decay follow from the recipe and the
step count from the run's state: tensors are all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.recipe.recipe import Recipe


def share_replicas(model_state: dict, rank: int, world: int) -> None:
    """Gives every data-parallel rank an even share, by bytes, of what they all hold, to save it for
    all.

    Args:
        model_state: the models' sharded tensors, chunk name -> key -> ShardedTensor; changed in
            place.
        rank, world: of the data-parallel group.
    """
    load = [0] * world
    for tensor in (t for chunk in model_state.values() for t in chunk.values()):
        owner = min(range(world), key=load.__getitem__)
        load[owner] += tensor.data.nbytes
        tensor.replica_id = (*tensor.replica_id[:-1], (rank - owner) % world)


@torch.no_grad()
def snapshot(model_state: dict) -> None:
    """Copies to the CPU what this rank saves, so that later steps do not change it; in place."""
    for tensor in (t for chunk in model_state.values() for t in chunk.values()):
        if is_main_replica(tensor.replica_id):
            tensor.data = tensor.data.detach().to("cpu", copy=True)


class OptimizerState:
    """Master weights and named state of this rank's parameters; see `base.ParameterState`.

    Args:
        optimizer: Megatron-Core's.
        models: this rank's model chunks.
        recipe: names the state.
    """

    def __init__(self, optimizer: MegatronOptimizer, models: list[nn.Module], recipe: Recipe):
        # one: a second would be that of experts, which no model here has
        (self._inner,) = optimizer.chained_optimizers
        self._recipe, self.names = recipe, recipe.saved
        self._parameters = [p for model in models for p in model.parameters() if p.requires_grad]
        self._sharded = isinstance(self._inner, DistributedOptimizer)

    def to_save(self, model_state: dict) -> dict:
        """Sharded tensors, each shaped like its parameter: copies on the CPU of what this rank
        saves, and tensors without content for what its replicas save.

        Args:
            model_state: the models' sharded tensors, chunk name -> key -> ShardedTensor.
        """
        places = _places(model_state)
        # All ranks gather every bucket, and each copies what it saves, an even share.
        mine = {p for p in self._parameters if is_main_replica(places[id(p)].replica_id)}
        return self._sharded_state(places, self._copies(mine), "meta")

    def to_load(self, model_state: dict) -> dict:
        """Sharded tensors like those of `to_save`, for a checkpoint to be read into."""
        return self._sharded_state(_places(model_state), {}, "cpu")

    def _sharded_state(self, places: dict[int, ShardedTensor],
                 copies: dict[nn.Parameter, dict[str, Tensor]], device: str) -> dict:
        """Number of a parameter -> name of a state -> sharded tensor.

        Args:
            places: id of a parameter -> its own sharded tensor.
            copies: parameter -> name -> tensor; of other parameters, tensors without content on
                `device`.
        """
        state = {}
        for number, parameter in enumerate(self._parameters):
            tensors = copies.get(parameter) or {
                name: torch.empty(parameter.shape, dtype=torch.float32, device=device)
                for name in self.names}
            place = places[id(parameter)]
            state[number] = {
                name: make_sharded_optimizer_tensor(place, t, f"optimizer.state.{name}")
                for name, t in tensors.items()}
        return state

    @torch.no_grad()
    def load(self, loaded: dict, steps: int) -> None:
        """Puts a filled `to_load` in place and sets the number of updates done."""
        for number, parameter in enumerate(self._parameters):
            for name in self.names:
                self._put(parameter, name, loaded[number][name])
        self._recipe.optimizer.set_steps(self._inner.optimizer, steps)

    @torch.no_grad()
    def whole(self, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        if not self._sharded:
            for parameter in self._parameters:
                yield parameter, self._owned(parameter)[1][name]
            return
        for buffer in self._inner.buffers:
            for bucket in buffer.buckets:
                gathered = self._gather_bucket(bucket, name)
                for parameter in bucket.params_list:
                    # param_index_map counts from the beginning of the buffer
                    start, end = (i - bucket.offset for i in buffer.param_index_map[parameter][:2])
                    yield parameter, gathered[start:end].view(parameter.shape)

    @torch.no_grad()
    def put(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        self._put(parameter, name, value)
        if name == MASTER:
            parameter.copy_(value)

    def settle(self) -> None:
        """`put` has set the weights that the model computes with."""

    def _put(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        part, owned = self._owned(parameter)
        if owned:
            owned[name].copy_(value.flatten()[part].view_as(owned[name]))

    def _owned(self, parameter: nn.Parameter) -> tuple[slice, dict[str, Tensor]]:
        """The range of the flattened parameter whose state this rank keeps, and that state; empty
        if none."""
        inner = self._inner
        if not self._sharded:
            # in fp32 a parameter is its own master
            part, main = slice(None), getattr(parameter, "main_param", parameter)
        # this rank's shard has a piece of it
        elif parameter in inner.model_param_gbuf_map:
            own = inner._get_model_param_range_map(parameter)["param"]
            group, order = inner.model_param_group_index_map[parameter]
            part = slice(own.start, own.end)
            main = inner.optimizer.param_groups[group]["params"][order]
        else:
            return slice(0), {}
        state = inner.optimizer.state[main]
        return part, {MASTER: main, **{name: state[name] for name in self._recipe.states}}

    def _copies(self, mine: set[nn.Parameter]) -> dict[nn.Parameter, dict[str, Tensor]]:
        """Copies on the CPU of the whole state of the parameters `mine`."""
        copies: dict[nn.Parameter, dict[str, Tensor]] = {p: {} for p in mine}
        for name in self.names:
            for parameter, tensor in self.whole(name):
                if parameter in mine:
                    copies[parameter][name] = tensor.detach().to("cpu", torch.float32, copy=True)
        return copies

    def _gather_bucket(self, bucket, name: str) -> Tensor:
        """One kind of state of all parameters of a bucket, at their places in it, from all
        data-parallel ranks."""
        group = self._inner.data_parallel_group
        gathered = torch.empty(bucket.grad_data.numel(), dtype=torch.float32,
                               device=bucket.grad_data.device)
        # padding between parameters belongs to nobody and stays zero
        shard = torch.zeros(gathered.numel() // group.size(), dtype=torch.float32,
                            device=gathered.device)
        for parameter in bucket.params_list:
            _, owned = self._owned(parameter)
            if owned:
                place = self._inner._get_model_param_range_map(parameter)["gbuf_local"]
                shard[place.start : place.end].copy_(owned[name].flatten())
        dist.all_gather_into_tensor(gathered, shard, group=group)
        return gathered


def _places(model_state: dict) -> dict[int, ShardedTensor]:
    """Id of a parameter -> its sharded tensor."""
    return {id(s.data): s for chunk in model_state.values() for s in chunk.values()
            if isinstance(s, ShardedTensor)}
