"""A directory that appears complete or not at all, and the progress towards it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

PARTIAL = ".partial"
_T = TypeVar("_T")


def require_free(output: Path) -> None:
    """Raises ValueError where something is at `output` already."""
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists; give a new directory")


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """A directory beside `output` to fill; at the end it is on disk and becomes `output` by one
    rename. Where anything goes wrong, an interrupt included, it is removed.

    Raises:
        ValueError: `output` exists.
    """
    require_free(output)
    partial = output.with_name(output.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(output.parent)


def _sync(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir():
            sync_directory(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())


def with_progress(items: Iterable[_T], total: int) -> Iterator[_T]:
    """The items, with a bar on standard error where that is a terminal."""
    return iter(tqdm(items, total=total, unit="tensor", dynamic_ncols=True, disable=None))


def write_json(path: Path, content: object) -> None:
    """Writes JSON so that a reader sees all of it or the old file."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_safely(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
