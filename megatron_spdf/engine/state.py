"""Optimizer state of either ZeRO stage as sharded tensors of one form: parameter -> master weight
and moments.

Megatron-Core's own `sharded_state_dict` of the optimizers does not serve:
- without Transformer Engine or Apex it loses torch AdamW's step count on resume: every parameter is
  given one shared step tensor, and losses drift from the second step on;
- its `fully_reshardable` form drops the padding between buckets on saving and then reads with it,
  so that every bucket after a padded one is saved shifted; compact weights have such lengths;
- it adds pickled parameter groups. Learning rate and weight decay follow from the recipe and the
step count from the run's state: tensors are all that is kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("param", *MOMENTS)


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


def optimizer_state(optimizer: MegatronOptimizer, models: list[nn.Module], model_state: dict,
                    loading: bool) -> dict:
    """Sharded master weights and moments, each shaped like its parameter, of all parameters of this
    rank.

    Args:
        model_state: the models' sharded tensors, chunk name -> key -> ShardedTensor.
        loading: whether to make place for a checkpoint's state instead of giving out ours: copies
            on the CPU of what this rank saves, and tensors without content for what others save.
    """
    (inner,) = optimizer.chained_optimizers
    _make_moments(inner)
    places = {id(s.data): s for chunk in model_state.values() for s in chunk.values()
              if isinstance(s, ShardedTensor)}
    mine = {p for p in _parameters(models) if is_main_replica(places[id(p)].replica_id)}
    whole = {} if loading else _whole(inner, models, mine)
    state = {}
    for number, parameter in enumerate(_parameters(models)):
        device = "cpu" if loading else "meta"
        tensors = whole.get(parameter) or {
            k: torch.empty(parameter.shape, dtype=torch.float32, device=device) for k in STATE}
        place = places[id(parameter)]
        state[number] = {k: make_sharded_optimizer_tensor(place, t, f"optimizer.state.{k}") for k,
                         t in tensors.items()}
    return state


def _make_moments(inner: MegatronOptimizer) -> None:
    """Before the first update there are none; Megatron-Core leaves out PyTorch's step count."""
    inner.init_state_fn(inner.optimizer, inner.config)
    if isinstance(inner.optimizer, torch.optim.AdamW):
        for parameter, state in inner.optimizer.state.items():
            state.setdefault("step", torch.zeros((), device=parameter.device))


@torch.no_grad()
def load_optimizer(optimizer: MegatronOptimizer, models: list[nn.Module], loaded: dict,
                   steps: int) -> None:
    """Puts loaded master weights and moments in place and sets Adam's step count."""
    (inner,) = optimizer.chained_optimizers
    for number, parameter in enumerate(_parameters(models)):
        part, owned = _owned(inner, parameter)
        for name, tensor in owned.items():
            tensor.copy_(loaded[number][name].flatten()[part].view_as(tensor))
    if isinstance(inner.optimizer, torch.optim.AdamW):  # counts per parameter
        for state in inner.optimizer.state.values():
            # as its fused form has it
            state["step"] = torch.full((), float(steps), device=state["exp_avg"].device)
    else:  # the fused ones of Apex and Transformer Engine count per group
        for group in inner.optimizer.param_groups:
            group["step"] = steps


def _parameters(models: list[nn.Module]) -> list[nn.Parameter]:
    return [p for model in models for p in model.parameters() if p.requires_grad]


def _owned(inner: MegatronOptimizer, parameter: nn.Parameter) -> tuple[slice, dict[str, Tensor]]:
    """The range of the flattened parameter whose state this rank keeps, and that state; empty if
    none."""
    if not isinstance(inner, DistributedOptimizer):
        part, main = slice(None), getattr(parameter, "main_param", parameter)
    elif parameter in inner.model_param_gbuf_map:
        own = inner._get_model_param_range_map(parameter)["param"]
        group, order = inner.model_param_group_index_map[parameter]
        part, main = slice(own.start, own.end), inner.optimizer.param_groups[group]["params"][order]
    else:
        return slice(0), {}
    state = inner.optimizer.state[main]
    return part, {"param": main, **{m: state[m] for m in MOMENTS}}


@torch.no_grad()
def _whole(inner: MegatronOptimizer, models: list[nn.Module], mine: set[nn.Parameter]) -> dict:
    """parameter -> kind of state -> copy on the CPU, for the parameters `mine`; with ZeRO-1
    gathered from the data-parallel ranks bucket by bucket."""
    if not isinstance(inner, DistributedOptimizer):
        return {p: {k: t.detach().to("cpu", torch.float32, copy=True) for k,
                    t in _owned(inner, p)[1].items()}
                for p in _parameters(models) if p in mine}
    whole: dict[nn.Parameter, dict[str, Tensor]] = {p: {} for p in mine}
    for buffer in inner.buffers:
        for bucket in buffer.buckets:
            for name in STATE:
                gathered = _gather_bucket(inner, bucket, name)
                for parameter in mine & bucket.params:
                    start, end = (i - bucket.offset for i in buffer.param_index_map[parameter][:2])
                    whole[parameter][name] = (
                        gathered[start:end].view(parameter.shape).to("cpu", copy=True)
                    )
    return whole


def _gather_bucket(inner: DistributedOptimizer, bucket, name: str) -> Tensor:
    """One kind of state of all parameters of a bucket, at their places in it, from all
    data-parallel ranks."""
    group = inner.data_parallel_group
    gathered = torch.empty(bucket.grad_data.numel(), dtype=torch.float32,
                           device=bucket.grad_data.device)
    shard = torch.zeros(gathered.numel() // group.size(), dtype=torch.float32,
                        device=gathered.device)
    for parameter in bucket.params_list:
        _, owned = _owned(inner, parameter)
        if owned:
            place = inner._get_model_param_range_map(parameter)["gbuf_local"]
            shard[place.start : place.end].copy_(owned[name].flatten())
    dist.all_gather_into_tensor(gathered, shard, group=group)
    return gathered
