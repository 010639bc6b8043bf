"""Border between two stages of a run: the weights of a checkpoint in an engine of another
density."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_spdf.checkpoint.reader import (
    AGES,
    FIRST_BITS,
    HELD_BITS,
    MASK_BITS,
    OPTIMIZER,
    TRAINED_BITS,
    VALUES,
    CheckpointReader,
    stored_name,
)
from megatron_spdf.engine.base import Engine
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.sparsity.largest import largest_bits
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.sparsity.slices import slice_of


def load_across_border(engine: Engine, checkpoint: Path, steps: int) -> None:
    """Fills an engine from a checkpoint of any layout, sparse or dense.

    Values come from the fp32 master weights. Weights that become dense have zeros where they were
    masked, so outputs do not change: the result equals a load of the checkpoint densified on disk.
    Those that become sparse, or sparser, keep the largest magnitudes of each slice.

    Args:
        engine: to fill.
        checkpoint: verified, and of the engine's model.
        steps: updates that the optimizer goes on from; entries that stay keep their state, all
            others start at zero. 0: it starts anew, with all state zero.
    """
    across = _Across(CheckpointReader(checkpoint), engine.plan, fresh=steps == 0)
    engine.load_state(across.fill(engine.state_to_load()), optimizer_steps=steps)


class _Across:
    """Tensors of the next stage, one at a time.

    Args:
        reader: of the stage before.
        plan: of the next.
        fresh: whether the optimizer starts anew.
    """

    def __init__(self, reader: CheckpointReader, plan: Plan, fresh: bool):
        self.reader, self.plan, self.fresh = reader, plan, fresh
        self._names = {stored_name(name): name for name in reader.weights}
        self._masks: dict[tuple[str, int], np.ndarray] = {}  # (weight, slice) -> packed bits

    def fill(self, wanted: dict | ShardedTensor) -> dict | Tensor:
        """Tensors for what an engine wants, nested alike."""
        if isinstance(wanted, dict):
            return {key: self.fill(part) for key, part in wanted.items()}
        return self._tensor(wanted).to(wanted.dtype)

    def _tensor(self, wanted: ShardedTensor) -> Tensor:
        state, key = MASTER, wanted.key
        if key.startswith(OPTIMIZER):
            state, key = key.removeprefix(OPTIMIZER).split(".", 1)
        # nothing is held at the beginning of a part: what was held is not stored any more
        if key.endswith((HELD_BITS, AGES)) or self.fresh and state != MASTER:
            return torch.zeros(wanted.local_shape, dtype=wanted.dtype)
        part = wanted.global_slice()
        is_mask = key.endswith((MASK_BITS, FIRST_BITS))  # with which the stage begins
        name = self._names[key.removesuffix(VALUES).removesuffix(MASK_BITS)
                           .removesuffix(FIRST_BITS).removesuffix(TRAINED_BITS)]
        if name not in self.plan.weights:
            return self.reader.state(name, state)[part]
        slices = range(*part[0].indices(self.plan.weights[name].slices))
        if key.endswith(TRAINED_BITS):  # until masks are chosen anew
            w = self.plan.weights[name]
            dense = self.reader.entries(name, MASTER)
            return largest_bits(torch.stack([slice_of(dense, w, each) for each in slices]),
                                w.trained_per_slice)
        masks = torch.from_numpy(np.stack([self._mask(name, number) for number in slices]))
        if is_mask:
            return masks
        return self._values(self.plan.weights[name], state, slices, masks)

    def _values(self, w: SparseWeight, state: str, slices: range, bits: Tensor) -> Tensor:
        """(slices, k), or all entries of the slices."""
        if w.algorithm.keeps:
            dense = self.reader.entries(w.name, state)
            return torch.stack([slice_of(dense, w, number) for number in slices])
        dense = self.reader.state(w.name, state)
        masks = np.unpackbits(bits.numpy(), axis=1, count=w.numel // w.slices).astype(bool)
        return torch.stack([slice_of(dense, w, number)[torch.from_numpy(mask)]
                            for number, mask in zip(slices, masks, strict=True)])

    def _mask(self, name: str, number: int) -> np.ndarray:
        """Packed bits of the largest magnitudes of a slice; kept, since every state asks."""
        if (name, number) not in self._masks:
            w = self.plan.weights[name]
            dense = self.reader.state(name, MASTER)
            for each in range(w.slices):  # the file is read once
                entries = slice_of(dense, w, each).numpy()
                self._masks[name, each] = np.packbits(w.largest(entries))
        return self._masks[name, number]
