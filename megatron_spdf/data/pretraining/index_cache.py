"""Files that are computed once: they appear whole or not at all, whoever else wants them at the
same time.

The first of several processes computes, those beside it wait for its lock. Where a file system has
no locks between nodes, two nodes may compute the same; the first to finish gives its files the
name, and the other one takes them.
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
    """The directory `cache`/`key`, filled by `build` if it is not there.

    Args:
        key: says all that the content depends on, so that what is there is never stale.
        build: writes files into the directory it is given.
    """
    place = cache / key
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{key}.lock", wait=True):
        here = f"{key}.{socket.gethostname()}"
        # by a process that was killed: on this host the lock is ours
        for left in cache.glob(f"{here}.*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        if not place.is_dir():
            name = f"{here}.{uuid.uuid4().hex}"
            with suppress(AlreadyThere), atomic_directory(place, name) as partial:
                build(partial)
    return place

