"""Files that are computed once: they appear whole or not at all, whoever else wants them at the
same time.

The first of several processes computes, those beside it wait for its lock. Where a file system has
no locks between nodes, two nodes may compute the same; the first to finish gives its files the
name, and the other one takes them.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

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
        for left in cache.glob(f"{here}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        if not place.is_dir():
            partial = cache / f"{here}.{uuid.uuid4().hex}.partial"
            partial.mkdir()
            build(partial)
            _publish(partial, place)
    return place


def _publish(partial: Path, place: Path) -> None:
    for file in partial.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    try:
        partial.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(partial)
