"""Moving the masks of a run: every rank chooses for its slices, and all that belongs to an active
entry goes where it goes, whatever the engine shards.

An engine shows master weights and named optimizer state whole, parameter by parameter
(`base.ParameterState`), so that all data-parallel ranks choose alike and carry alike. What is held
beside them at a time is one kind of state of one bucket or parameter, and the indices of the masks
that move, from where and to where.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor, nn

from megatron_spdf.engine.base import Engine
from megatron_spdf.kernels.mask import ones
from megatron_spdf.layers.compact import CompactWeight, compact_of, sparse_modules
from megatron_spdf.layers.masked import MaskedWeight
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.sparsity import moving
from megatron_spdf.sparsity.algorithms.base import MaskAlgorithm, Moment
from megatron_spdf.sparsity.history import NOTHING, Change


@torch.no_grad()
def move_masks(engine: Engine, algorithm: MaskAlgorithm, when: Moment) -> dict[str, Change]:
    """Moves the masks of all sparse weights, between two steps; all ranks call.

    Kept entries keep their master weight and optimizer state, those that are born have zeros. Where
    the algorithm needs the dense gradient, the step before has collected it.

    Returns:
        Canonical name -> what the move changed in the whole weight, on every rank.
    """
    sparse = _sparse_parameters(engine)
    after = _choose(engine, algorithm, when, sparse)
    carriers = {parameter: _carrier(sparse[parameter], bits) for parameter, bits in after.items()}
    for name in engine.state.names if after else ():
        for parameter, values in engine.state.whole(name):
            if carry := carriers.get(parameter):
                engine.state.put(parameter, name, carry(_as_values(values, sparse[parameter])))
    if after:
        engine.state.settle()
    return _over_all_ranks({c.planned.name: c.move_mask(after.get(p, c.mask_bits))
                            for p, c in sparse.items()}, engine)


@torch.no_grad()
def hold_entries(engine: Engine, algorithm: MaskAlgorithm, when: Moment) -> dict[str, Change]:
    """Holds entries at zero that an algorithm chooses, with all their state; all ranks call.

    Returns:
        Canonical name -> what died in the whole weight, on every rank.
    """
    sparse, kept = _sparse_parameters(engine), {}
    before = count_held(engine)
    for parameter, master in engine.state.whole(MASTER):
        if compact := sparse.get(parameter):
            kept[parameter] = moving.kept_entries(
                algorithm, when, compact.planned, engine.plan.seed, _first_slice(compact),
                compact.mask_bits, compact.kept, _as_values(master, compact))
    for name in engine.state.names:
        for parameter, values in engine.state.whole(name):
            if parameter in kept:
                compact = sparse[parameter]
                engine.state.put(parameter, name, _as_values(values, compact) * kept[parameter])
    engine.state.settle()
    for parameter, entries in kept.items():
        sparse[parameter].hold(entries)
    return {name: Change(held - before[name], engine.plan.weights[name].active)
            for name, held in count_held(engine).items()}


def count_held(engine: Engine) -> dict[str, int]:
    """Canonical name -> number of entries held at zero in the whole weight, on every rank."""
    held = {c.planned.name: Change((~c.kept).sum(), 0)
            for c in _sparse_parameters(engine).values() if c.kept is not None}
    return {name: change.moved for name, change in _over_all_ranks(held, engine).items()}


def count_chosen(engine: Engine) -> dict[str, Change]:
    """Canonical name -> what a whole weight changed when it last chose its mask, on every rank."""
    born = {c.planned.name: c.seen(c.born)
            for c in _sparse_parameters(engine).values()
            if isinstance(c, MaskedWeight) and c.born is not None}
    return _over_all_ranks(born, engine)


def _sparse_parameters(engine: Engine) -> dict[nn.Parameter, CompactWeight]:
    return {m.parametrizations.weight.original: compact_of(m)
            for model in engine.models for m in sparse_modules(model)}


def _first_slice(compact: CompactWeight) -> int:
    """Number of this rank's first slice of a weight."""
    return ps.get_tensor_model_parallel_rank() * len(compact.mask_bits)


def _choose(engine: Engine, algorithm: MaskAlgorithm, when: Moment,
            sparse: dict[nn.Parameter, CompactWeight]) -> dict[nn.Parameter, Tensor]:
    """The next mask bits of the weights whose masks change; data-parallel ranks have the same."""
    after = {}
    for parameter, master in engine.state.whole(MASTER):
        if compact := sparse.get(parameter):
            gradient = _sum_gradient(compact) if algorithm.needs == "dense_gradient" else None
            bits = moving.moved_masks(
                algorithm, when, compact.planned, engine.plan.seed, _first_slice(compact),
                compact.mask_bits, _as_values(master, compact), gradient)
            after[parameter] = bits
    if not after:
        return after
    # whether a mask moved, and whether its slices have as many active entries as values; the host
    # waits once for all weights
    found = torch.stack([torch.stack([
        (bits != sparse[parameter].mask_bits).any(),
        (ones(bits).sum(-1) == sparse[parameter].values_shape[1]).all()])
        for parameter, bits in after.items()]).tolist()
    assert all(full for _, full in found), f"{algorithm.name} changes how many entries are active"
    return {parameter: bits
            for (parameter, bits), (has, _) in zip(after.items(), found, strict=True) if has}


def _carrier(compact: CompactWeight, after: Tensor) -> moving.Carrier:
    entries, active = compact.mask.entries, compact.values_shape[1]
    return moving.Carrier(compact.mask_bits, after, entries, active)


def _sum_gradient(compact: CompactWeight) -> Tensor:
    """The gradient of the whole batch's loss with respect to this rank's part of a dense weight,
    (out, in): signed, so that what replicas disagree on cancels out."""
    group = ps.get_data_parallel_group(with_context_parallel=True)
    gradient = compact.collector.gradient.float().contiguous()
    dist.all_reduce(gradient, group=group)
    return gradient.div_(group.size())


def _as_values(state: Tensor, compact: CompactWeight) -> Tensor:
    """(slices, k) where the mask is; offloaded state lies in the host's memory."""
    return state.view(compact.values_shape).to(compact.mask_bits.device)


def _over_all_ranks(changes: dict[str, Change], engine: Engine) -> dict[str, Change]:
    """Sums over the ranks; replicas after the first count nothing. The host waits for all numbers
    at once."""
    device, width = next(engine.models[0].parameters()).device, len(fields(Change))
    if not engine.plan.weights:
        return {}
    counts = [getattr(changes.get(name, NOTHING), field.name)
              for name in engine.plan.weights for field in fields(Change)]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    total = torch.tensor([0 if isinstance(n, Tensor) else n for n in counts], device=device)
    total += torch.stack([n.long() if isinstance(n, Tensor) else zero for n in counts])
    total *= engine.data_parallel_rank == 0
    dist.all_reduce(total)
    return {name: Change(*found)
            for name, found in zip(engine.plan.weights, total.view(-1, width).tolist(),
                                   strict=True)}
