"""Shared memory, through which the loader processes of a rank pass their batches."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.tables import MIB

SHARED_MEMORY = Path("/dev/shm")
ITEM_BYTES = 3 * 8 + 4  # tokens, labels and positions, and the loss mask, of a token


def prefetched(recipe: Recipe) -> int:
    """Micro-batches that each loader process has ready: those of two steps."""
    return 2 * recipe.micro_batches


def require_shared_memory(recipe: Recipe) -> None:
    """Refuses loader processes whose batches do not fit. Other ranks of the host are not counted.

    Raises:
        ValueError: one rank alone needs more than is free.
    """
    if recipe.train.micro_batch == AUTO:
        recipe = recipe.with_micro_batch(1)  # fewer of larger ones take as much
    t, workers = recipe.train, recipe.data.workers
    needed = workers * prefetched(recipe) * t.micro_batch * t.sequence_length * ITEM_BYTES
    if workers and needed > (free := _free_bytes()):
        raise ValueError(f"data.workers={workers}: {SHARED_MEMORY} has {free / MIB.size:,.1f} MiB "
                         f"free, and the batches of one rank's loader processes take "
                         f"{needed / MIB.size:,.1f}; {_remedy()}")


def shared_memory_fault(error: Exception) -> str:
    """A sentence for an error of a loader for which shared memory is too small; empty for another
    error."""
    signs = ("No space left on device", "Bus error", "shared memory")
    if not any(sign in str(error) for sign in signs):
        return ""
    return (f"a loader process found no room in {SHARED_MEMORY}, which has "
            f"{_free_bytes() / MIB.size:,.1f} MiB free; {_remedy()}")


def _free_bytes() -> int:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # there is none
        return 0
    return found.f_bavail * found.f_frsize


def _remedy() -> str:
    return ("make it larger (docker run --shm-size=16g; mount -o remount,size=16g "
            f"{SHARED_MEMORY}), remove what others left in it, or set data.workers=0")
