"""Initial values from a stream keyed by (seed, weight name, chunk), so that they are the same at every layout.

A sparse weight draws the values of the dense one and keeps the active ones: theta_0 <- mask * theta_0
(Thangarasa et al. 2023, section 2.2).
"""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.tensor_parallel.layers import (
    param_is_not_tensor_parallel_duplicate,
    set_tensor_model_parallel_attributes,
)
from numpy.random import Generator, Philox
from torch import Tensor, nn

from megatron_spdf.model.weights import EMBEDDING, TIED_OUTPUT, Weight
from megatron_spdf.sparsity.compact import compact_of
from megatron_spdf.sparsity.masks import stream_key

STREAM = "megatron_spdf init stream 1"


def draw_values(weight: Weight, seed: int, chunks: int, rank: int, world: int) -> Tensor:
    """This rank's shard of the dense initial weight, float32.

    Args:
        weight: a weight with a normal initial distribution.
        chunks: C; drawn chunk by chunk, so that a rank draws its own chunks only.
        rank, world: of the tensor-parallel group.
    """
    assert weight.std is not None, weight.name
    if weight.axis is None:
        mine, shape = range(1), weight.shape
    else:
        mine = range(rank * chunks // world, (rank + 1) * chunks // world)
        shape = tuple(n // chunks if i == weight.axis else n for i, n in enumerate(weight.shape))
    drawn = [
        Generator(Philox(key=stream_key(STREAM, seed, weight.name, c))).standard_normal(shape, dtype=np.float32)
        for c in mine
    ]
    values = drawn[0] if len(drawn) == 1 else np.concatenate(drawn, axis=weight.axis or 0)
    return torch.from_numpy(values).mul_(weight.std)


@torch.no_grad()
def initialise(
    module: nn.Module, name: str, weights: dict[str, Weight], seed: int, chunks: int, rank: int, world: int
) -> None:
    """Fills and marks the direct parameters of one module, `name` being its canonical name; on the meta device there
    is nothing to fill.

    Megatron-Core marks parameters as tensor-parallel while it initialises them, which we do in its stead; without
    the mark a shard counts as a copy and is left out of the gradient norm on all ranks but the first.
    """
    compact = compact_of(module)
    owned = dict(module.named_parameters(recurse=False))
    if compact is not None:
        owned["weight"] = module.parametrizations.weight.original
    for key, parameter in owned.items():
        full = f"{name}.{key}"
        weight = weights[EMBEDDING if full == TIED_OUTPUT else full]
        if weight.axis is not None:
            _mark(parameter, 0 if compact is not None and key == "weight" else weight.axis)  # chunks are cut along 0
        if parameter.is_meta:
            continue
        if weight.std is None:
            parameter.fill_(1.0 if key == "weight" else 0.0)
            continue
        values = draw_values(weight, seed, chunks, rank, world).to(parameter.device)
        parameter.copy_(values if compact is None else compact.right_inverse(values))


def _mark(parameter: nn.Parameter, axis: int) -> None:
    if not getattr(parameter, "tensor_model_parallel", False):
        for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            vars(parameter).pop(mark, None)
        set_tensor_model_parallel_attributes(parameter, True, axis, 1)
    assert param_is_not_tensor_parallel_duplicate(parameter)
