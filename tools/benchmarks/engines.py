"""Engines of recipes in one process, and batches for them."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.architecture.base import Weight
from megatron_spdf.parallel import fake_cuda
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.sparsity.plan import Plan, SparseWeight

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@contextmanager
def joined(recipe: Recipe) -> Iterator[torch.device]:
    """Joins the ranks of a layout; gives this one's device, which on a machine without a GPU is the
    CPU."""
    fake_cuda.install()  # before anything that imports megatron.core
    device = init_distributed(find_ranks(), recipe)
    try:
        yield device
    finally:
        destroy()


def build_engine(recipe: Recipe, device: torch.device, quick: bool = False):
    """Builds the engine that a recipe names, among ranks that are joined.

    Args:
        quick: initial values are drawn on the device, and every layer has the masks of the first:
            those of billions of weights take minutes otherwise, and speed does not depend on them.
    """
    from megatron_spdf.engine.factory import make_engine

    plan = Plan.of(recipe)
    if not quick:
        return make_engine(recipe, plan, device)
    torch.manual_seed(recipe.seed)  # of what is drawn on the device: the same in every run
    with _masks_of_first_layer():
        return make_engine(recipe, plan, device, QuickWeights(device))


@dataclass(frozen=True)
class QuickWeights:
    """Initial values, see `model.init.InitialWeights`, drawn where they are needed."""

    device: torch.device

    def shard(self, weight: Weight, rank: int, world: int) -> Tensor:
        shape = tuple(n // world if i == weight.axis else n for i, n in enumerate(weight.shape))
        if weight.std is not None:
            return torch.empty(shape, device=self.device).normal_(std=weight.std)
        return torch.full(shape, 1.0 if weight.name.endswith(".weight") else 0.0,
                          device=self.device)

    def mask_bits(self, weight: Weight, rank: int, world: int) -> None:
        return None


@contextmanager
def _masks_of_first_layer() -> Iterator[None]:
    from megatron_spdf.layers import compact

    drawn = cache(SparseWeight.draw)

    def of_first_layer(planned: SparseWeight, seed: int, slice_id: int) -> np.ndarray:
        return drawn(replace(planned, name=re.sub(r"layers\.\d+\.", "layers.0.", planned.name)),
                     seed, slice_id)

    with (patch.object(SparseWeight, "draw", of_first_layer),
          # they are as drawn
          patch.object(compact.CompactWeight, "_check_masks", lambda self: None)):
        yield


@contextmanager
def shared_directory(prefix: str) -> Iterator[Path]:
    """A temporary directory that all joined ranks know, removed when they are done."""
    import torch.distributed as dist

    place = [tempfile.mkdtemp(prefix=prefix) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(place)
    try:
        yield Path(place[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(place[0])


def synthetic_batch(recipe: Recipe, number: int) -> list[dict]:
    """This rank's micro-batches of random tokens, (B, T) each."""
    shape = (recipe.train.micro_batch, recipe.train.sequence_length + 1)
    draw = torch.Generator().manual_seed(number)
    batch = []
    for _ in range(recipe.micro_batches):
        text = torch.randint(recipe.model.vocab_size, shape, generator=draw)
        tokens = text[:, :-1].contiguous()
        position = torch.arange(tokens.size(1)).expand_as(tokens).contiguous()
        batch.append({"tokens": tokens, "labels": text[:, 1:].contiguous(),
                      "position_ids": position,
                      "loss_mask": torch.ones(tokens.shape)})
    return batch


def take_steps(recipe: Recipe, engine, numbers: range) -> None:
    """Optimizer steps on synthetic batches."""
    for number in numbers:
        engine.step(synthetic_batch(recipe, number), number, number * recipe.tokens_per_step, False)


def end_with_parent() -> None:
    """Has Linux end this process when the one that started it ends, by whatever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_memory() -> None:
    """Frees what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_of(run, before: int = 0) -> int | None:
    """Most bytes of tensors on the GPU while something runs, without what others hold; None without
    a GPU.

    Args:
        run: is called.
        before: bytes of what is already there and belongs to what runs.
    """
    if not torch.cuda.is_available():
        run()
        return None
    others = allocated() - before
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - others
