"""Agreement of all ranks on files that rank 0 finds or makes.

On a network file system other ranks may see such a file seconds later. If nodes do not share the
file system they never see it.
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_spdf.checkpoint import store
from megatron_spdf.files import new_file

PATIENCE = 60.0  # seconds; NFS remembers for as long by default that a name was not there


class NotSharedFilesystem(ValueError):
    """Raised if ranks do not see the same files."""


def newest_of_all(directory: Path) -> Path | None:
    """Newest checkpoint that rank 0 sees, on every rank. None if there is none.

    Raises:
        NotSharedFilesystem: on all ranks alike, if one of them does not see it.
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
    """Makes sure that all ranks see files that rank 0 writes to a directory. All ranks call it.

    Raises:
        NotSharedFilesystem: on all ranks alike, if one of them does not.
    """
    said = [f".{uuid.uuid4().hex}", ""]
    if dist.get_rank() == 0:
        try:
            new_file(directory / said[0]).close()
        except OSError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0)
    if said[1]:
        raise NotSharedFilesystem(f"{directory} cannot be written: {said[1]}; make room, or choose "
                                  "another output")
    token = directory / said[0]
    try:
        await_everywhere(token)
    finally:
        if dist.get_rank() == 0:
            token.unlink()


def await_everywhere(path: Path) -> None:
    """Waits until every rank sees a file that rank 0 has written.

    Raises:
        NotSharedFilesystem: on all ranks alike; names those that do not see it.
    """
    end = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    blind = [""] * dist.get_world_size()
    here = f"rank {dist.get_rank()} on {socket.gethostname()}"
    dist.all_gather_object(blind, "" if path.exists() else here)
    named = [b for b in blind if b]
    if named:
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        raise NotSharedFilesystem(f"{', '.join(named[:8])}{more} cannot see {path}, which rank 0 "
                                  "can; the output must be on a file system that all nodes share, "
                                  "under the same path")
