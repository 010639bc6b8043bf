"""Initial values from a stream keyed by (seed, weight name, slice), so that they are the same at
every layout.

A sparse weight draws the values of the dense one and keeps the active ones: theta_0 <- mask *
theta_0 (Thangarasa et al. 2023, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from megatron.core.tensor_parallel.layers import (
    param_is_not_tensor_parallel_duplicate,
    set_tensor_model_parallel_attributes,
)
from numpy.random import Generator, Philox
from torch import Tensor, nn

from megatron_spdf.architecture.base import EMBEDDING, Weight
from megatron_spdf.layers.compact import compact_of
from megatron_spdf.random_streams import stream_key

STREAM = "megatron_spdf init stream 1"
REVIVED = "megatron_spdf revived stream 1"


def draw_values(
    weight: Weight, seed: int, slices: int, rank: int, world: int, stream: str = STREAM
) -> Tensor:
    """This rank's shard of the dense initial weight, float32.

    Args:
        weight: a weight with a normal initial distribution.
        slices: C; drawn slice by slice, so that a rank draws its own slices only.
        rank, world: of the tensor-parallel group.
        stream: other streams, other values.
    """
    assert weight.std is not None, weight.name
    if weight.axis is None:
        mine, shape = range(1), weight.shape
    else:
        mine = range(rank * slices // world, (rank + 1) * slices // world)
        shape = tuple(n // slices if i == weight.axis else n for i, n in enumerate(weight.shape))
    drawn = [
        Generator(Philox(key=stream_key(stream, seed, weight.name,
                                        c))).standard_normal(shape, dtype=np.float32)
        for c in mine
    ]
    values = drawn[0] if len(drawn) == 1 else np.concatenate(drawn, axis=weight.axis or 0)
    return torch.from_numpy(values).mul_(weight.std)


class InitialWeights(Protocol):
    """Where initial values come from."""

    def shard(self, weight: Weight, rank: int, world: int) -> Tensor:
        """This tensor-parallel rank's shard of the dense weight, float32."""

    def mask_bits(self, weight: Weight, rank: int, world: int) -> np.ndarray | None:
        """The mask of this rank's slices as `CompactWeight.mask_bits` keeps it; None: the one that
        the plan draws."""

    def held_bits(self, weight: Weight, rank: int, world: int) -> np.ndarray | None:
        """Which active entries of this rank's slices are held, as `CompactWeight.held_bits` keeps
        it; None: none is. Asked for where the mask algorithm holds some."""


@dataclass(frozen=True)
class DrawnWeights:
    """Values drawn anew; ones for norm weights, zeros for biases."""

    seed: int
    slices: int

    def shard(self, weight: Weight, rank: int, world: int) -> Tensor:
        if weight.std is not None:
            return draw_values(weight, self.seed, self.slices, rank, world)
        shape = tuple(n // world if i == weight.axis else n for i, n in enumerate(weight.shape))
        return torch.full(shape, 1.0 if weight.name.endswith(".weight") else 0.0)

    def mask_bits(self, weight: Weight, rank: int, world: int) -> None:
        return None

    held_bits = mask_bits


@dataclass(frozen=True)
class LoadedWeights:
    """Values of a trained model.

    Args:
        read: canonical name -> the whole weight, dense.
        read_mask: canonical name -> the mask of all its slices, for weights that stay sparse.
        read_held: canonical name -> which active entries are held, for those that hold some.
        revived: std of the entries of linear weights that are zero there, in units of the weight's
            initial std; 0: zero.
        seed, slices: of the revived entries, which are the same at every layout.
    """

    read: Callable[[str], Tensor]
    read_mask: Callable[[str], np.ndarray] | None = None
    revived: float = 0.0
    seed: int = 0
    slices: int = 1
    read_held: Callable[[str], np.ndarray] | None = None

    def shard(self, weight: Weight, rank: int, world: int) -> Tensor:
        values = self.read(weight.name).float()
        if weight.axis is not None:
            values = values.chunk(world, weight.axis)[rank]
        if self.revived > 0.0 and weight.linear:
            drawn = draw_values(weight, self.seed, self.slices, rank, world, REVIVED)
            values = torch.where(values == 0, self.revived * drawn, values)
        return values

    def mask_bits(self, weight: Weight, rank: int, world: int) -> np.ndarray | None:
        return None if self.read_mask is None else np.split(self.read_mask(weight.name),
                                                            world)[rank]

    def held_bits(self, weight: Weight, rank: int, world: int) -> np.ndarray | None:
        return None if self.read_held is None else np.split(self.read_held(weight.name),
                                                            world)[rank]


@torch.no_grad()
def initialize(
    module: nn.Module, name: str, weights: dict[str, Weight], source: InitialWeights, rank: int,
    world: int
) -> None:
    """Fills and marks the direct parameters of one module, `name` being its canonical name; on the
    meta device there is nothing to fill.

    Megatron-Core marks parameters as tensor-parallel while it initializes them, which we do in its
    stead; without the mark a shard counts as a copy and is left out of the gradient norm on all
    ranks but the first.
    """
    compact = compact_of(module)
    for parameter, weight in owned_weights(module, name, weights):
        sparse = compact is not None and weight.linear
        if weight.axis is not None:
            _mark(parameter, 0 if sparse else weight.axis)  # slices are cut along 0
        if parameter.is_meta:
            continue
        if sparse and (bits := source.mask_bits(weight, rank, world)) is not None:
            compact.begin_with(torch.from_numpy(bits))
            holds = compact.planned.algorithm.holds
            if holds and (held := source.held_bits(weight, rank, world)) is not None:
                compact.held_bits.copy_(torch.from_numpy(held))
        values = source.shard(weight, rank, world).to(parameter.device)
        parameter.copy_(compact.right_inverse(values) if sparse else values)


def owned_weights(
    module: nn.Module, name: str, weights: dict[str, Weight]
) -> Iterator[tuple[nn.Parameter, Weight]]:
    """The direct parameters of a module, a compact one in place of its dense weight, and what they
    are."""
    owned = dict(module.named_parameters(recurse=False))
    if compact_of(module) is not None:
        owned["weight"] = module.parametrizations.weight.original
    for key, parameter in owned.items():
        full = f"{name}.{key}"
        # a tied LM head is no weight of its own
        yield parameter, weights[full if full in weights else EMBEDDING]


def _mark(parameter: nn.Parameter, axis: int) -> None:
    if not getattr(parameter, "tensor_model_parallel", False):
        for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            vars(parameter).pop(mark, None)
        set_tensor_model_parallel_attributes(parameter, True, axis, 1)
    assert param_is_not_tensor_parallel_duplicate(parameter)
