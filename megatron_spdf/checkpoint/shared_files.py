"""What rank 0 finds or makes on disk, agreed on by all ranks: others see it on a network file
system maybe seconds later, and where nodes do not share the file system never."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_spdf.checkpoint import store

PATIENCE = 60.0  # seconds; NFS remembers for as long by default that a name was not there


class NotSharedFilesystem(ValueError):
    """Ranks do not see the same files."""


def newest_of_all(directory: Path) -> Path | None:
    """The newest checkpoint that rank 0 sees, on every rank; None: there is none.

    Raises:
        NotSharedFilesystem: a rank does not see it; on all alike.
    """
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        there = store.visible(directory)
        found = [there[-1].name if there else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return None
    await_everywhere(directory / found[0])
    return directory / found[0]


def check_shared(directory: Path) -> None:
    """Makes sure that all ranks see what rank 0 writes to a directory; all call.

    Raises:
        NotSharedFilesystem: some do not; on all alike.
    """
    name = [f".{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    token = directory / name[0]
    if dist.get_rank() == 0:
        token.write_text("")
    dist.barrier()
    try:
        await_everywhere(token)
    finally:
        if dist.get_rank() == 0:
            token.unlink()


def await_everywhere(path: Path) -> None:
    """Waits until every rank sees what rank 0 has written.

    Raises:
        NotSharedFilesystem: naming, on every rank alike, those that do not.
    """
    end = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    blind = [""] * dist.get_world_size()
    dist.all_gather_object(blind,
                           "" if path.exists() else f"rank {dist.get_rank()} on "
                                                    f"{socket.gethostname()}")
    named = [b for b in blind if b]
    if named:
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        raise NotSharedFilesystem(f"{', '.join(named[:8])}{more} cannot see {path}, which rank 0 "
                                  "can; the output must be on a file system that all nodes share, "
                                  "under the same path")
