"""Locks between processes: of a file on one machine, and of a directory among all that see it.

Neither outlives its holder. Libraries of file locks were looked at: those that need no locks of the
file system (`filelock`, `flufl.lock`) take a file away from a holder that they find dead, know no
batch jobs, and lose a lock that a slow file system has not let them refresh.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_spdf.files import new_file, open_to_append, write_file
from megatron_spdf.text import printable

# File systems without locks: what is guarded here is then guarded by atomic renames alone.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
BEAT_SECONDS = 10.0  # between two signs of life of a holder
DEAD_SECONDS = 60.0  # without one, on the clock of who waits
LOCK = re.compile(r"lock\.([1-9]\d{0,8})")
_FREE = b"{}\n"  # content of a lock that was let go
_RECORD_BYTES = 4096  # of a lock file, at most


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


class Held(ValueError):
    """Another process holds a directory."""


@dataclass(frozen=True)
class Holder:
    """Process that holds a directory, as its lock file has it.

    Attributes:
        host, pid: of the process.
        started: ticks from the machine's start to the process's.
        machine: its start and its numbering of processes; the same for containers that share both.
        job, restart: of Slurm: cluster and number of the job, and how often it was requeued.
        since: time of day, for people.
        token: tells two holds of one process apart.
    """

    host: str = ""
    pid: int = 0
    started: int = 0
    machine: str = ""
    job: str = ""
    restart: int = 0
    since: str = ""
    token: str = ""

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        job = os.environ.get("SLURM_JOB_ID", "")
        cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
        restart = os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), _machine(),
                   f"{cluster}:{job}" if job and cluster else job,
                   int(restart) if restart.isdecimal() else 0,
                   time.strftime("%Y-%m-%dT%H:%M:%S%z"), secrets.token_hex(8))

    def __str__(self) -> str:
        job = f" of Slurm job {self.job}" if self.job else ""
        return printable(f"process {self.pid} on {self.host}{job}, since {self.since}")

    def runs(self) -> bool | None:
        """True if the process still runs; None: that cannot be told from here."""
        mine = Holder.here()
        # Slurm starts a job again only when its processes have ended or their node has failed.
        if self.job and self.job == mine.job and self.restart < mine.restart:
            return False
        if not self.machine or self.machine != mine.machine:
            return None
        return _started(self.pid) == self.started


class DirectoryLock:
    """Lock of a directory among all processes that see it, on whatever machine.

    The holder is the process that made `lock.N` of the highest N. A process makes the next one,
    exclusively, when that holder has let go or is dead. So nobody removes what others may look at,
    and of several that find a holder dead one alone comes after it. All it takes of the file system
    is exclusive creation. A holder changes the time of its file every `BEAT_SECONDS`. Who waits on
    another machine looks for any change of it, so that no two clocks are compared.

    Args:
        directory: made if it is missing.
        lost: called in a thread with a sentence where another process has come after this one,
            which was stopped for so long that it seemed dead.
    """

    def __init__(self, directory: Path, lost: Callable[[str], None]):
        self.directory, self.lost = directory, lost
        self._mine: Path | None = None
        self._let_go = threading.Event()

    def take(self) -> None:
        """Takes the lock. A process that ends has let go of it, however it ends.

        Raises:
            Held: another process has it.
            OSError: the directory cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        while self._mine is None:
            number = _highest(self.directory)
            if number:
                self._require_gone(self.directory / f"lock.{number}")
            mine = self.directory / f"lock.{number + 1}"
            with suppress(FileExistsError):  # another was quicker: look at that one
                self._record = json.dumps(asdict(Holder.here())).encode()
                _make(mine, self._record)
                if _highest(self.directory) == number + 1:
                    self._mine = mine
                else:  # made by a slow process, where a lock was that is long over
                    mine.unlink()
        for path in _locks(self.directory):
            if path != self._mine:
                path.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def let_go(self) -> None:
        """Lets go of the lock. Without it, nothing happens.

        The file stays, since a process that looked at it may be about to make the next one. A
        directory that holds nothing else is removed.
        """
        mine, self._mine = self._mine, None
        if mine is None:
            return
        self._let_go.set()
        with suppress(OSError):  # it then ends with this process
            if os.listdir(self.directory) == [mine.name]:
                mine.unlink()
                self.directory.rmdir()
            elif mine.exists():
                write_file(mine, _FREE)

    def _require_gone(self, path: Path) -> None:
        """Raises Held unless the holder of a lock file is gone, which may take `DEAD_SECONDS`."""
        seen = _look(path)
        holder = _holder(seen[0])
        runs = False if seen[0] == _FREE else holder.runs()
        if runs is None:
            print(f"{self.directory} is locked by {holder}; waiting up to {DEAD_SECONDS:.0f} s to "
                  "see whether it runs", file=sys.stderr, flush=True)
        end = time.monotonic() + DEAD_SECONDS
        while runs is None and time.monotonic() < end:
            time.sleep(DEAD_SECONDS / 60)
            if (now := _look(path)) != seen:
                holder, runs = _holder(now[0]), now[0] not in (_FREE, b"")
        if runs:
            raise Held(f"{self.directory} is in use by {holder}; wait until that has ended, end "
                       "it, or choose another output")

    def _beat(self) -> None:
        mine = self._mine
        while not self._let_go.wait(BEAT_SECONDS):
            with suppress(OSError):  # tried again: a file system that fails stops nobody here
                there = self.directory / f"lock.{_highest(self.directory)}"
                content = _look(there)[0]
                if (there, content) == (mine, self._record):
                    os.utime(mine, follow_symlinks=False)
                elif is_lock(there.name):
                    self.lost(f"{self.directory} was taken over by {_holder(content)}, since this "
                              f"process gave no sign of life for {DEAD_SECONDS:.0f} s")
                    return
                elif not self._let_go.is_set():
                    _make(mine, self._record)  # somebody removed it


def is_lock(name: str) -> bool:
    """True if a file of this name in a directory is one of its locks."""
    return LOCK.fullmatch(name) is not None


def _locks(directory: Path) -> list[Path]:
    return [directory / name for name in os.listdir(directory) if is_lock(name)]


def _highest(directory: Path) -> int:
    """Number of the lock that counts, 0 without one."""
    return max((int(path.name.removeprefix("lock.")) for path in _locks(directory)), default=0)


def _make(path: Path, content: bytes) -> None:
    """Makes a file exclusively."""
    with new_file(path) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _look(path: Path) -> tuple[bytes, int]:
    """Content of a lock file, and the time of its last change in nanoseconds. Empty without one.

    Opening it makes a network file system ask its server.
    """
    try:
        # a FIFO that somebody laid there must not hold this process up
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b"", 0
    try:
        status = os.fstat(handle)
        regular = stat.S_ISREG(status.st_mode)
        return os.read(handle, _RECORD_BYTES) if regular else b"", status.st_mtime_ns
    finally:
        os.close(handle)


def _holder(content: bytes) -> Holder:
    """Reads a record; what is none, or a part of one, is a process that nothing is known of."""
    try:
        record = json.loads(content)
        made = Holder(**record)
    except (ValueError, TypeError, RecursionError):
        return Holder(host="an unknown host")
    sound = all(type(getattr(made, field.name)) is type(field.default) for field in fields(Holder))
    return made if sound else Holder(host="an unknown host")


def _started(pid: int) -> int:
    """Ticks from the machine's start to that of a process; 0 where none of this number runs."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(rest[18])  # a zombie has ended


def _machine() -> str:
    """Start of this machine, and the namespace that numbers its processes."""
    try:
        return (Path("/proc/sys/kernel/random/boot_id").read_text().strip()
                + f" {os.stat('/proc/self/ns/pid').st_ino}")
    except OSError:
        return ""
