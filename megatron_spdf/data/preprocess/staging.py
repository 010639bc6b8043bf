"""From PREFIX.partial to the final names: what lies under those is complete, whatever happens on
the way.

Several data sets are one directory, which is renamed. A single data set is four names, renamed one
after the other, the manifest last; before the first, PREFIX.partial/ready says that all is made, so
that an interrupted renaming is finished by the next run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_spdf.data.indexed.manifest import CORPUS, file_of
from megatron_spdf.files import (
    new_file,
    publish,
    require_directory,
    require_outside_checkpoints,
)
from megatron_spdf.locks import locked

# The order in which files go away and come in: at no moment do an old and a new file look like one
# data set.
_REMOVE_ORDER = ("json", "idx", "bin", "tokenizer")
_PUBLISH_ORDER = ("tokenizer", "bin", "idx", "json")


class Partial:
    """PREFIX.partial, where a data set or a directory of them is made.

    Attributes:
        base: a single data set is made as `base`.bin and so on.
        tree: several are made in this directory.
    """

    def __init__(self, prefix: str | Path, several: bool):
        self.prefix, self.several = str(prefix).rstrip(os.sep) if several else str(prefix), several
        self.directory = file_of(self.prefix, "partial")
        self.base, self.tree = self.directory / "part", self.directory / "set"
        self._ready = self.directory / "ready"

    def base_of(self, name: str) -> Path:
        """Path without ending at which a data set is made; a single one has the name ""."""
        return self.tree / name if self.several else self.base

    @property
    def ready(self) -> bool:
        """True if all is made and only to be renamed."""
        return self._ready.exists()

    @property
    def finished_inputs(self) -> int:
        """Inputs that an interrupted run has finished; 0 also if there is no document in them."""
        if not os.path.isdir(self.directory):  # false, too, of what cannot be a directory's name
            return 0
        ledger = self.directory / "ledger.jsonl"
        return (
            ledger.read_bytes().count(b"\n")
            if any(self.directory.rglob("*.bin")) and ledger.exists()
            else 0
        )

    @contextmanager
    def opened(self, overwrite: bool) -> Iterator[None]:
        """Creates the directory, or takes over that of an interrupted run, and keeps other runs
        out.

        It is removed at the end; after an error, if no input is finished in it.

        Raises:
            ValueError: the output exists and `overwrite` is false, or another run is making it.
        """
        if not self.ready:
            self.require_free(overwrite)
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / "lock", wait=False) as held:
            if not held:
                raise ValueError(f"{self.directory} is in use: another run is making this data "
                                 "set; wait for its end")
            try:
                yield
            except BaseException:
                if not self.finished_inputs and not self.ready:
                    shutil.rmtree(self.directory)
                raise
            self._remove()

    def _remove(self) -> None:
        """`ready` goes last: a run that is killed meanwhile is finished by the next, like an
        interrupted renaming."""
        for entry in self.directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != self._ready:
                entry.unlink()
        shutil.rmtree(self.directory)

    def require_free(self, overwrite: bool) -> None:
        """Raise a ValueError if the output exists and `overwrite` is false, cannot be written, or
        is in a checkpoint."""
        prefix = Path(self.prefix)
        require_outside_checkpoints(prefix if self.several else prefix.parent)
        require_directory(prefix.parent)
        start, _, name = self.prefix.rpartition(os.sep)
        if not self.several and name in ("", os.curdir, os.pardir):
            place = Path(start, name)
            raise ValueError(f"output {place}{os.sep} is a directory; add the start of the file "
                             f"names: {place / 'train'}")
        if self.several:
            existing = str(prefix) if prefix.exists() else ""
            if existing and not (prefix / CORPUS).is_file():
                raise ValueError(f"output {prefix} exists and is no directory of data sets; choose "
                                 "another")
        else:
            files = [file_of(prefix, suffix) for suffix in _PUBLISH_ORDER]
            existing = ", ".join(str(file) for file in files if file.exists())
        if existing and not overwrite:
            raise ValueError(f"output exists: {existing}. Choose another prefix, or pass "
                             "--overwrite")

    def publish(self) -> None:
        """Moves what is made to its names, in place of what is older; goes on where an interrupted
        call stopped."""
        if not self.ready:
            new_file(self._ready).close()
        if self.several:
            self._publish_tree()
        else:
            self._publish_files()

    def _publish_tree(self) -> None:
        if not self.tree.exists():
            return
        for made in self.tree.rglob("*.lengths"):
            made.unlink()
        prefix = Path(self.prefix)
        if prefix.exists():
            shutil.rmtree(self.directory / "old", ignore_errors=True)
            prefix.rename(self.directory / "old")
        publish(self.tree, prefix)

    def _publish_files(self) -> None:
        waiting = {suffix for suffix in _PUBLISH_ORDER if file_of(self.base, suffix).exists()}
        for suffix in (s for s in _REMOVE_ORDER if s in waiting):
            old = file_of(self.prefix, suffix)
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        for suffix in (s for s in _PUBLISH_ORDER if s in waiting):
            os.replace(file_of(self.base, suffix), file_of(self.prefix, suffix))
