"""Transition between two stages of a run: dense weights of a checkpoint in an engine without
moments."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_spdf.checkpoint.reader import OPTIMIZER, CheckpointReader, stored_name
from megatron_spdf.engine.base import Engine
from megatron_spdf.optimizers.base import MASTER


def load_densified(engine: Engine, checkpoint: Path) -> None:
    """Fills a dense engine from a checkpoint of any layout, sparse or dense.

    The result equals a load of the checkpoint densified on disk. Values come from the fp32 master
    weights, and masked entries are zero, so outputs do not change. The optimizer's state is zero
    and its count starts at one: revived weights have no moments, and the schedule's second warm-up
    makes up for a fresh count.

    Args:
        engine: to fill.
        checkpoint: verified, and of the engine's model.
    """
    reader = CheckpointReader(checkpoint)
    names = {stored_name(name): name for name in reader.weights}

    def fill(wanted: dict | ShardedTensor) -> dict | Tensor:
        if isinstance(wanted, dict):
            return {key: fill(part) for key, part in wanted.items()}
        stored = wanted.key.removeprefix(f"{OPTIMIZER}{MASTER}.")
        if stored.startswith(OPTIMIZER):
            return torch.zeros(wanted.local_shape, dtype=wanted.dtype)
        return reader.parameter(names[stored])[wanted.global_slice()].to(wanted.dtype)

    engine.load_state(fill(engine.state_to_load()), optimizer_steps=0)
