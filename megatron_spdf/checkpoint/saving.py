"""Writes one checkpoint in a thread, over a process group of its own, while training goes on.

All ranks agree on the outcome of each part of a save. Where one fails (a full disk, a file system
that is gone), all of them end the save with the same error, which names the rank and its host, and
nothing becomes visible.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spdf.checkpoint import store
from megatron_spdf.files import new_file, remove
from megatron_spdf.resilience.progress import in_background

WRITERS = 2  # files, and threads that write them, per rank
T = TypeVar("T")


class SaveFailed(OSError):
    """Raised if a checkpoint could not be written. Older checkpoints are untouched."""


class SaveThread(threading.Thread):
    """Thread that writes a snapshot and makes it visible. All ranks start one at the same step.

    Args:
        partial: directory to write to, a name that ends in `.partial`.
        state: `Engine.state_to_save()`.
        add_files: called on rank 0 with the directory, to write all files but the tensors'.
        after: called on rank 0 once the checkpoint is visible, to tidy up; gives sentences about
            what it could not do, which is no failure of the save.
        group: gloo process group of all ranks, not used otherwise meanwhile.
        validate: check with all ranks that every part of every tensor is saved exactly once.

    Attributes:
        path: of the checkpoint.
        error: cause of a failure, the same on every rank; None before the thread ends.
        said: by `after`.
        seconds: duration of the thread.
    """

    def __init__(self, partial: Path, state: dict, add_files: Callable[[Path], None],
                 after: Callable[[], list[str]], group: dist.ProcessGroup, validate: bool):
        super().__init__(name=f"save {partial.name}", daemon=True)
        self.partial, self.add_files, self.after, self.group = partial, add_files, after, group
        self.path = partial.with_name(partial.name.removesuffix(store.PARTIAL))
        self.error: SaveFailed | None = None
        self.said: list[str] = []
        self.seconds = 0.0
        tensors, _ = save_preprocess(state, validate)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors,
                                                                keep_only_main_replica=True)
        self._state = mcore_to_pyt_state_dict(flat, is_loading=False)

    def run(self) -> None:
        """Writes the snapshot, as the thread's main function."""
        in_background()
        started = time.perf_counter()
        try:
            self._write()
        except SaveFailed as error:
            self.error = error
            self._on_first(lambda: shutil.rmtree(self.partial, ignore_errors=True))
        except Exception as error:  # a rank is gone, so ranks can no longer agree
            self.error = SaveFailed(str(error))
        finally:
            self._state = {}
            self.seconds = time.perf_counter() - started

    def _write(self) -> None:
        self._on_first(self._prepare)
        self._write_tensors()
        self._on_first(self._complete_format)
        names = self._on_all(lambda: store.files_of(self.partial) if self.group.rank() == 0
                             else [])[0]
        shares = self._on_all(lambda: self._describe_share(names))
        files = {name: entry for share in shares for name, entry in sorted(share.items())}
        self._on_first(lambda: store.complete(self.partial, files))
        self._on_first(self._tidy_up)

    def _tidy_up(self) -> None:
        try:
            self.said = self.after()
        except OSError as error:
            self.said = [f"could not tidy up: {error}"]

    def _prepare(self) -> None:
        remove(self.partial)
        self.partial.mkdir(parents=True)

    def _write_tensors(self) -> None:
        writer = dcp.FileSystemWriter(self.partial, thread_count=WRITERS)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        try:
            dcp.save(self._state, storage_writer=writer, planner=planner, process_group=self.group)
        except CheckpointException as error:  # on all ranks alike
            hosts = self._on_all(socket.gethostname)
            said = [f"rank {r} on {hosts[r]}: {failure[0]}"
                    for r, failure in sorted(error.failures.items())]
            free = shutil.disk_usage(self.partial.parent).free
            raise SaveFailed(f"{'; '.join(said)} ({free:,} bytes are free at "
                             f"{self.partial.parent})") from None

    def _complete_format(self) -> None:
        """Writes the files that Megatron-Core's loader wants beside the tensors, and our own."""
        save_config(CheckpointingConfig("torch_dist", 1), str(self.partial))
        with new_file(self.partial / "common.pt") as file:
            torch.save({}, file)
        self.add_files(self.partial)

    def _describe_share(self, names: list[str]) -> dict[str, dict[str, object]]:
        """Sizes and checksums of this rank's share of the files that rank 0 sees."""
        unseen = {p.name for p in self.partial.glob(f"__{self.group.rank()}_*")} - set(names)
        if unseen:
            raise OSError(f"rank 0 does not see {', '.join(sorted(unseen))} in {self.partial}; the "
                          "output must be on a file system that all nodes share")
        return {n: store.describe(self.partial / n)
                for n in names[self.group.rank()::self.group.size()]}

    def _on_first(self, action: Callable[[], object]) -> None:
        """Runs an action on rank 0, and raises on all ranks if it fails there."""
        self._on_all(action if self.group.rank() == 0 else lambda: None)

    def _on_all(self, action: Callable[[], T]) -> list[T]:
        """Runs an action on every rank and returns the results by rank.

        Raises:
            SaveFailed: on all ranks alike, if the action fails on any of them.
        """
        outcome: tuple[object, str] = (None, "")
        try:
            outcome = (action(), "")
        except (OSError, RuntimeError) as error:  # torch.save raises the second on a full disk
            outcome = (None, f"rank {self.group.rank()} on {socket.gethostname()}: {error}")
        shared: list = [None] * self.group.size()
        dist.all_gather_object(shared, outcome, group=self.group)
        failed = [error for _, error in shared if error]
        if failed:
            raise SaveFailed("; ".join(failed))
        return [result for result, _ in shared]
