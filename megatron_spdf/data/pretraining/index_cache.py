"""Cache of index files that several processes want at the same time.

A directory appears whole or not at all. The first of several processes computes, and the others
wait for its lock. Where a file system has no locks between nodes, two nodes may compute the same
directory: the first to finish names it, and the other one uses it.
"""

from __future__ import annotations

import shutil
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_spdf.files import PARTIAL, AlreadyThere, atomic_directory
from megatron_spdf.locks import locked


def built_once(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Returns the directory `cache`/`key`, filled by `build` if it is not there.

    Args:
        cache: directory that all processes share.
        key: names all that the content depends on, so that an existing directory is never stale.
        build: writes files into the directory it is given.
    """
    place = cache / key
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{key}.lock", wait=True):
        here = f"{key}.{socket.gethostname()}"
        # Left by a process that was killed: the lock of this host is ours.
        for left in cache.glob(f"{here}.*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        if not place.is_dir():
            name = f"{here}.{uuid.uuid4().hex}"
            with suppress(AlreadyThere), atomic_directory(place, name) as partial:
                build(partial)
    return place

