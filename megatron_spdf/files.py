"""Files and directories that appear whole or not at all, and are on disk once they have their name.

Nothing is ever written through a symbolic link that someone has laid where a file is to appear, and
nothing into a complete checkpoint. Every file that the package and the tools write is written here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megatron_spdf.records.json_writer import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTIAL = ".partial"  # ends the name of a directory in the making
NEW = ".new"  # ends the name of a file in the making
# Both are in a complete checkpoint: progress of the run, and the list of all its files.
RUN, FILES = "run.json", "files.json"
CHECKPOINT = re.compile(r"step_(\d{8})")  # name of a complete checkpoint, and its step
_POINTER = b"version https://git-lfs.github.com/spec/"
_SAMPLED_BYTES = 1 << 20  # at each of three places of a file


class AlreadyThere(OSError, ValueError):
    """Something has the name that a new directory was to get."""


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file; a reader sees all of it or what was there before.

    The bytes go to a random name beside it, which must be new, and the file takes its name from
    there. A link at `path` is replaced, what it leads to is left alone.

    Raises:
        ValueError: `path` lies in a checkpoint, or something that is no file has the name.
    """
    _require_name(path)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(6)}{NEW}")
    try:
        with _naming(path), new_file(beside) as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Names what is written in an error of the system that names nothing, such as that of a full
    disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(place)
        raise


def _require_name(path: Path) -> None:
    """Requires that a path may be a file's."""
    require_outside_checkpoints(path.parent)
    if path.exists() and not path.is_file() or path.parent == Path("/dev"):
        raise ValueError(f"{path} is no ordinary file; give the name of one")


def require_writable(path: Path) -> None:
    """Raises a ValueError where `write_file` could not write a path now."""
    _require_name(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: {path.parent} is a file; give another file")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no directory {path.parent}; make it, "
                         "or give another file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is read-only for this user; "
                         "give another file")


def write_json(path: Path, content: object) -> None:
    """`write_file` of JSON; see `to_json`."""
    write_file(path, to_json(content, indent=1) + "\n")


def save_figure(figure: Figure, path: Path) -> None:
    """`write_file` of a picture, in the format that the name ends in, else as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:] or "png")
    write_file(path, picture.getvalue())


def new_file(path: Path) -> IO[bytes]:
    """Opens a file that is not there yet, to be filled.

    Raises:
        FileExistsError: something has the name, be it a link.
        ValueError: `path` lies in a checkpoint.
    """
    require_outside_checkpoints(path.parent)
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def open_to_append(path: Path, **options: int) -> IO[bytes]:
    """Opens a file, made if it is missing, for what is added at its end.

    Raises:
        OSError: `path` is a link.
        ValueError: it lies in a checkpoint.
    """
    require_outside_checkpoints(path.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return open(os.open(path, flags, 0o666), "ab", **options)


def require_outside_checkpoints(place: Path) -> None:
    """Raises a ValueError where a directory is a complete checkpoint or lies in one, by whatever
    path it is named: a checkpoint with another file in it is damaged."""
    real = Path(os.path.realpath(place))
    for directory in (real, *real.parents):
        if all((directory / name).is_file() for name in (RUN, FILES)):
            raise ValueError(f"{place} lies in the checkpoint {directory}, to which nothing may be "
                             "added; choose another place for the output")


def inside(directory: Path, name: str) -> Path:
    """Path of an output of ours in a directory of others.

    Raises:
        ValueError: a link makes it lie elsewhere.
    """
    path = directory / name
    if leads_out(directory, path):
        raise ValueError(f"{path} is reached by a link that leads to {os.path.realpath(path)}; "
                         "remove the link, or name another place for the output")
    return path


def require_own(directory: Path, path: Path) -> None:
    """Raises a ValueError where a link makes a file that is to be read lie elsewhere than in the
    directory whose file it seems to be."""
    if leads_out(directory, path):
        raise ValueError(f"{path} is a link that leads out of {directory}, to "
                         f"{os.path.realpath(path)}; put a copy in its place, or leave out "
                         f"{directory}")


def leads_out(directory: Path, path: Path) -> bool:
    """True if a link makes a path in a directory lie elsewhere."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file for reading.

    Raises:
        OSError: `path` is a link, a directory, a pipe or a device. None of them is waited for.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is no regular file")
    return file


def remove(path: Path) -> None:
    """Removes a file, a directory and all in it, or a link, and never what a link leads to.

    Raises:
        OSError: a part of it could not be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def links_out(directory: Path) -> list[Path]:
    """Links in a directory that lead out of it, or nowhere."""
    inside = os.path.realpath(directory)
    return [path for path in sorted(directory.iterdir()) if path.is_symlink() and not
            (os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(inside))]


def require_free(output: Path) -> None:
    """Raises AlreadyThere where something is at `output`."""
    if output.exists() or output.is_symlink():
        raise AlreadyThere(f"{output} exists; give a new directory")


def require_directory(output: Path, key: str = "output") -> None:
    """Raises a ValueError where `output` is no directory that can be written, or made, or is in a
    checkpoint.

    Args:
        key: names it in the message.
    """
    require_outside_checkpoints(output)
    path = output.absolute()
    there = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        what = "a link that leads nowhere" if not there.exists() else "a file"
        raise ValueError(f"{key}={output} cannot be written: {there} is {what}; choose another "
                         f"{key}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={output} cannot be written: {there} is read-only for this user; "
                         f"choose another {key}")


@contextmanager
def atomic_directory(output: Path, beside: str = "") -> Iterator[Path]:
    """A directory to fill, which becomes `output` at the end; removed where anything goes wrong, an
    interrupt included.

    Args:
        beside: its name before `output`'s, ".partial" at the end; default: that of `output`. What a
            killed process left under this name is removed.

    Raises:
        AlreadyThere: `output` exists, at the start or at the end.
        ValueError: it lies in a checkpoint, or another process is making it.
    """
    require_outside_checkpoints(output.parent)
    require_free(output)
    partial = output.with_name((beside or output.name) + PARTIAL)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _naming(output), _held(partial):
        try:
            yield partial
            for path in partial.rglob("*"):
                sync(path)
            publish(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Makes an empty directory, which no other process makes anew until this one is done with it.

    Raises:
        ValueError: another process has it.
    """
    try:
        partial.mkdir()
    except FileExistsError:
        if partial.is_symlink() or not partial.is_dir():
            raise
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _alone(handle) or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise ValueError(f"another process is at work in {partial}; wait for its end, or give "
                             "another output")
        for left in partial.iterdir():  # by a process that was killed
            remove(left)
        yield
    finally:
        os.close(handle)


def _alone(handle: int) -> bool:
    """True if no other process holds the lock of an open directory, which this one then does."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems lock no directories
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def publish(partial: Path, output: Path) -> None:
    """Gives a directory, whose files are on disk, its name by one rename.

    Raises:
        AlreadyThere: there is something of this name.
    """
    sync(partial)
    try:
        partial.rename(output)
    except OSError:
        require_free(output)
        raise
    sync(output.parent)


def require_fetched(path: Path) -> None:
    """Raises a ValueError where a file is what Git LFS leaves in the place of one that it has not
    fetched."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{path} is a pointer of Git LFS and not the file; run `git lfs "
                                 "pull` where it was cloned, or download the file")


def sampled_sha256(files: Iterable[Path]) -> str:
    """Hashes the sizes, and the start, middle and end, of files."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for start in (0, max(0, size // 2), max(0, size - _SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Returns when a file, or the names in a directory, outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_standard_streams() -> None:
    """Opens /dev/null where standard input, output or error is closed, as a daemon leaves them:
    the next file that is opened would have its number, and get what libraries print."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == number, (opened, number)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))
