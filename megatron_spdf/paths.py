"""Paths as users write them, in recipes and on command lines: `~`, and patterns of names."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

_LONGEST_NAME = 255  # bytes of a file's name: NAME_MAX of Linux and of its usual file systems
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expand_home(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by that home directory, as shells do where
    they see it: not inside of quotes, of `--output=~/x` or of `output=~/x`.

    Raises:
        ValueError: there is no such user, a name in it is longer than file systems have them, or
            the path is empty, as an unset variable of a shell is, the address of something in a
            network, or has a control character, such as the end of a line, which would cut the
            lines of every log that names it.
    """
    if not path:
        raise ValueError("a path is empty; name a file or directory, . for this one")
    if control := next((c for c in path if unicodedata.category(c) == "Cc"), ""):
        raise ValueError(f"the path {path[:80]!r} has the control character {control!r}; rename "
                         "what it names, or choose another name")
    if _ADDRESS.match(path):
        raise ValueError(f"{path:.80} is an address, and only files of this machine are read and "
                         f"written; copy or mount it, and give its path (./{path:.80} for a "
                         "directory of that name)")
    for name in path.split(os.sep):
        length = len(os.fsencode(name))
        if length > _LONGEST_NAME and not glob.has_magic(name):
            raise ValueError(f"a path has a name of {length} bytes, {name[:40]}..., over the "
                             f"{_LONGEST_NAME} that file systems take; shorten it")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no user {path.split('/')[0][1:]!r}, whose home this "
                         f"would be; write ./{path} for a file of that name")
    return expanded


def real(path: str | Path) -> Path:
    """The absolute path without links. Unlike `Path.resolve`, links that lead in a circle are left
    for the one who opens the path."""
    return Path(os.path.realpath(path))


def named_by(pattern: str) -> list[str]:
    """The paths that a pattern names, sorted; what exists literally is taken before it is taken for
    a pattern, directory by directory: `v[1]/*.jsonl` are files of `v[1]` where that is there."""
    return sorted(_below("", list(Path(pattern).parts) or [os.curdir]))


def _below(place: str, names: list[str]) -> Iterator[str]:
    if not names:
        yield place
        return
    name, rest = names[0], names[1:]
    literal = os.path.join(place, name)
    if os.path.lexists(literal):
        yield from _below(literal, rest)
    elif glob.has_magic(name):
        for found in _everything(place) if name == "**" else glob.glob(
                name, root_dir=place or None):
            yield from _below(os.path.join(place, found) if found else place, rest)


def _everything(place: str, seen: set[tuple[int, int]] | None = None) -> Iterator[str]:
    """The names of what lies in a directory at any depth, relative to it and the directory itself
    first; without hidden ones, as `**` means it. Links are followed, and each directory is walked
    once, by whatever names: links may lead round in circles.

    Args:
        seen: devices and inodes of the directories that were walked.
    """
    seen = set() if seen is None else seen
    here = place or os.curdir
    if os.path.isdir(here):
        found = os.stat(here)
        if (found.st_dev, found.st_ino) in seen:
            return
        seen.add((found.st_dev, found.st_ino))
    yield ""
    try:
        names = sorted(name for name in os.listdir(here) if not name.startswith("."))
    except OSError:  # a file, or what may not be read
        return
    for name in names:
        yield from (os.path.join(name, below) if below else name
                    for below in _everything(os.path.join(place, name), seen))


def same_file(paths: list[Path]) -> tuple[Path, Path] | None:
    """The first two paths of one file, by whatever links; None: each is a file of its own."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        found = path.stat()
        key = found.st_dev, found.st_ino
        if key in seen:
            return seen[key], path
        seen[key] = path
    return None
