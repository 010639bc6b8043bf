"""Locks between processes that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_spdf.files import open_to_append

# File systems without locks: what is guarded here is then guarded by atomic renames alone.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock file `path`, made if it is missing and left in place.

    Args:
        wait: for another process to let go; otherwise False is yielded while one holds it.
    """
    with open_to_append(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, *_NO_LOCKS):
                raise
            held = error.errno in _NO_LOCKS
        # Whoever held it may have removed it: a lock on a file that has no name locks nobody out.
        yield held and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
