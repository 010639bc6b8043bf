"""Checkpoint directory on disk: completed by one rename, checked by size and checksum.

    checkpoints/step_00000500/            weights, masks, optimizer: Megatron-Core's format
    checkpoints/step_00000500/run.json    progress and recipe of the run
    checkpoints/step_00000500/files.json  every file with its bytes and SHA-256, written last
    checkpoints/step_00001000.partial/    a save that did not finish; discarded at the next start
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from megatron_spdf.files import (
    CHECKPOINT,
    FILES,
    PARTIAL,
    RUN,
    open_regular,
    publish,
    remove,
    write_json,
)
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.text import printable

BEST = "best.json"  # beside the checkpoints: names the one with the lowest validation loss
_MOST_BYTES = 1 << 30  # of a file without tensors
_NAMED = 20  # faults that one message names
_UNFINISHED = re.compile(CHECKPOINT.pattern + re.escape(PARTIAL))


class Best(TypedDict):
    """Content of best.json."""

    checkpoint: str
    loss: NotRequired[float | None]


class Listed(TypedDict):
    """Entry of files.json."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class DamagedCheckpoint(ValueError):
    """Raised if the files of a checkpoint are not those that its list says."""


def name_of(step: int) -> str:
    """Directory name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint, from its directory name."""
    return int(checkpoint.name.removeprefix("step_"))


def visible(directory: Path) -> list[Path]:
    """Lists the checkpoints of a run, oldest first. Each was complete when it got its name."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if CHECKPOINT.fullmatch(p.name)),
                  key=lambda p: p.name)


def best(directory: Path) -> Path | None:
    """Checkpoint of a run with the lowest validation loss. None if the run does not keep it.

    Raises:
        ValueError: the record of it is damaged.
    """
    try:
        named = directory / read_json(directory / BEST, Best, constants=True)["checkpoint"]
    except FileNotFoundError:
        return None
    return named if named in visible(directory) else None


def require_present(directory: Path) -> None:
    """Raises a ValueError where a checkpoint of a run is a link that leads nowhere, or a file."""
    for path in visible(directory):
        if not path.is_dir():
            leads = f"leads to {path.readlink()}, which is not there" if path.is_symlink() else (
                "is a file")
            raise ValueError(f"checkpoint {path} {leads}; bring it back, or remove {path.name} to "
                             "resume from the one before")


def may_be_elsewhere(link: Path) -> bool:
    """True if a run's directory of checkpoints may be this link: the user has made it, and it leads
    to checkpoints that are no other run's, with nothing beside them."""
    try:
        owned = link.lstat().st_uid in (0, os.geteuid())
        there = Path(os.path.realpath(link))
        names = [path.name for path in there.iterdir()]
    except OSError:
        return False
    ours = all(CHECKPOINT.fullmatch(n) or _UNFINISHED.fullmatch(n) or n == BEST for n in names)
    return owned and ours and bool(visible(there)) and not (there.parent / "recipe.yaml").exists()


def run_of(path: Path) -> Path | None:
    """Run that a checkpoint belongs to, by whatever path it is named; None: it lies in none. Any
    other directory is itself."""
    if not ((path / RUN).is_file() and (path / FILES).is_file()):
        return path
    for named in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        if named.parent.name == "checkpoints":
            return named.parents[1]
    return None


def discard_incomplete(directory: Path) -> list[str]:
    """Removes saves that did not finish and checkpoints half removed.

    Returns:
        A sentence for each, which says so where it could not be removed.
    """
    if not directory.is_dir():
        return []
    gone = sorted(p for p in directory.iterdir() if _UNFINISHED.fullmatch(p.name))
    return [_try_to_remove(path) or f"discarded {path.name}, a save that did not finish"
            for path in gone]


def retain(directory: Path, keep: int, keep_every: int = 0,
           spare: Collection[str] = ()) -> list[str]:
    """Removes complete checkpoints that are not to be kept. Of one that is a link, the link.

    Each is renamed first, so that a crash in the middle leaves a `.partial` and not a checkpoint
    with files missing.

    Args:
        directory: of the run's checkpoints.
        keep: number of the newest to keep.
        keep_every: keep also those of every `keep_every`th step; 0: none.
        spare: names of those to keep beside.

    Returns:
        A sentence for each that could not be removed.
    """
    said = []
    for path in visible(directory)[:-keep]:
        if path.name in spare or keep_every and step_of(path) % keep_every == 0:
            continue
        dying = path.with_name(path.name + PARTIAL)
        try:
            path.rename(dying)
        except OSError as error:
            said.append(f"could not remove {path.name}: {error}")
            continue
        said.append(_try_to_remove(dying))
    return [sentence for sentence in said if sentence]


def _try_to_remove(path: Path) -> str:
    """Removes something, and returns why that could not be done, which is empty if it is gone."""
    try:
        remove(path)
    except OSError as error:
        return f"could not remove {path.name}: {error}"
    return ""


def files_of(checkpoint: Path) -> list[str]:
    """Lists the names, relative to the checkpoint, of all its files but the list itself."""
    return sorted(name for name, kind in _contents(checkpoint) if kind == "file" and name != FILES)


def holds_tensors(name: str) -> bool:
    """True if a file, by its name, may be as large as a model."""
    return name.endswith(".distcp")


def _contents(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """Names of everything in a checkpoint but directories, and what each is. No link is
    followed."""
    for directory, names, files in os.walk(checkpoint):
        for name in files + [name for name in names if os.path.islink(os.path.join(directory,
                                                                                    name))]:
            path = Path(directory, name)
            mode = path.lstat().st_mode
            kind = "file" if stat.S_ISREG(mode) else "link" if stat.S_ISLNK(mode) else (
                "pipe, socket or device")
            yield path.relative_to(checkpoint).as_posix(), kind


def describe(path: Path) -> Listed:
    """Flushes a file to disk, and returns its bytes and SHA-256."""
    with open_regular(path) as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def complete(partial: Path, files: dict[str, Listed]) -> Path:
    """Writes the list of files, which are on disk, and makes the checkpoint visible."""
    write_json(partial / FILES, files)
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    publish(partial, final)
    return final


def verify(checkpoint: Path, checksums: bool = True, names: list[str] | None = None) -> None:
    """Compares the files of a checkpoint with its list.

    Args:
        checkpoint: directory of the checkpoint.
        checksums: also read every byte; sizes alone find truncation but not a flipped bit.
        names: checksum these files only (ranks share the work); sizes are always checked for all.

    Raises:
        DamagedCheckpoint: naming every file that is missing, of another size or content, or not in
            the list.
    """
    try:
        listed = read_json(checkpoint / FILES, dict[str, Listed])
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint / FILES} cannot be read ({error}); use another "
                                "checkpoint, or remove this one to resume from the one before"
                                ) from None
    found = dict(_contents(checkpoint))
    if found.get(FILES) == "file":
        del found[FILES]
    faults = [f"{printable(name[:100])} is missing"
              for name in sorted(listed.keys() - found.keys())]
    added = []
    for name, kind in sorted(found.items()):
        if kind != "file":
            faults.append(f"{printable(name[:100])} is a {kind} and no file")
        elif name not in listed:
            added.append(f"{printable(name[:100])} is not in the list")
        elif fault := _other_than_listed(checkpoint / name, listed[name],
                                         checksums and (names is None or name in names)):
            faults.append(f"{name} {fault}")
    if faults:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {_some(faults + added)}. "
                                "Remove this checkpoint to resume from the one before")
    if added:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} holds what was not saved with it: "
                                f"{_some(added)}. Move that out of it to go on")


def _other_than_listed(path: Path, listed: Listed, checksum: bool) -> str:
    size = path.lstat().st_size
    if size != listed["bytes"]:
        return f"has {size} bytes instead of {listed['bytes']}"
    if size > _MOST_BYTES and not holds_tensors(path.name):
        return f"has {size:,} bytes, and no such file has more than {_MOST_BYTES:,}"
    return ("has another content than was written" if checksum and describe(path) != listed else "")


def _some(faults: list[str]) -> str:
    more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return "; ".join(faults[:_NAMED]) + more
