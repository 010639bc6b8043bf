"""Cache of index files that several processes want at the same time.

A directory appears whole or not at all. The first of several processes computes, and the others
wait for its lock. Where a file system has no locks between nodes, two nodes may compute the same
directory: the first to finish names it, and the other one uses it. Where the cache cannot be
written, each process computes for itself and keeps the files in a temporary directory.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_spdf.data.indexed.tokens import DataFault
from megatron_spdf.files import PARTIAL, AlreadyThere, atomic_directory
from megatron_spdf.locks import locked

_KEPT: list[tempfile.TemporaryDirectory] = []  # until this process ends


def built_once(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Returns the directory `cache`/`key`, filled by `build` if it is not there.

    Args:
        cache: directory that all processes share.
        key: names all that the content depends on, so that an existing directory is never stale.
        build: writes files into the directory it is given.

    Raises:
        DataFault: there is no room in the temporary directory either.
    """
    try:
        return _in_cache(cache, key, build)
    except OSError as error:  # a full disk, above all
        print(f"the index cache {cache} cannot be written ({error}): this process keeps the index "
              f"in {tempfile.gettempdir()}", file=sys.stderr, flush=True)
    directory = tempfile.TemporaryDirectory(prefix="index_")
    _KEPT.append(directory)
    try:
        build(Path(directory.name))
    except OSError as error:
        raise DataFault(f"neither the index cache {cache} nor {directory.name} can be written "
                         f"({error}); make room, or name another place by data.index_cache"
                         ) from None
    return Path(directory.name)


def _in_cache(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
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

