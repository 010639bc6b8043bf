"""Run directory, which holds everything that the run of a recipe writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.run_metadata import read_run_record
from megatron_spdf.checkpoint.shared_files import check_shared
from megatron_spdf.exit_codes import GUARD_STOPPED
from megatron_spdf.files import (
    NEW,
    links_out,
    require_directory,
    require_outside_checkpoints,
    write_json,
)
from megatron_spdf.locks import DirectoryLock, Held, is_lock
from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.finetune import Finetune, load_finetune
from megatron_spdf.recipe.load import save_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.recorded import as_recorded
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.records.values import typed
from megatron_spdf.records.yaml_reader import read_yaml
from megatron_spdf.resilience import restarts

RECIPE = "recipe.yaml"
CONTENTS = "contents.json"  # of what the recipe names by a path, at the last start


def task_of(run: Path) -> str | None:
    """The task that a run was fine-tuned on; None: it was not, or is no run."""
    kept = run / RECIPE
    values = read_yaml(kept) if kept.is_file() else None
    data = values.get("data") if isinstance(values, dict) else None
    task = data.get("task") if isinstance(data, dict) else None
    return task if isinstance(task, str) else None


def splits_of(run: Path, task: str) -> Path | None:
    """Path of the data of a task that a run was fine-tuned on; None: it was not.

    Raises:
        ValueError: the run's recipe cannot be read.
    """
    return Path(load_finetune(run / RECIPE).data.path) if task_of(run) == task else None


class RunDir:
    """Paths of a run. `check` comes before a device is touched, `create` after the ranks are
    joined.

    Args:
        recipe: its `output` names the directory.
        contents: key of the recipe -> hash of what lies at its path; an input that has moved is
            known by it.

    Attributes:
        held: on rank 0, who else holds the directory; empty: nobody.
    """

    def __init__(self, recipe: Recipe | Finetune, contents: Mapping[str, str] | None = None):
        self.recipe, self.contents = recipe, dict(contents or {})
        self.root = Path(recipe.output)
        self.checkpoints = self.root / "checkpoints"
        self.log = self.root / "log.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.lock = DirectoryLock(self.root, _end_at_once)
        self.held = ""
        self.cache = Path(getattr(recipe.data, "index_cache", None) or self.root / "cache")

    def check(self) -> None:
        """Refuses a directory that cannot be written, is no run directory, or holds the run of
        another recipe.

        Raises:
            ValueError: naming the reason, and each key that differs with both values.
        """
        kept = self.root / RECIPE
        require_directory(self.root)
        require_outside_checkpoints(self.cache)
        self._check_links()
        self._check_writable()
        if not kept.is_file():
            if self.root.exists() and (not self.root.is_dir() or any(self._others())):
                raise ValueError(f"output={self.root} exists and is not a run directory (it has no "
                                 f"{RECIPE}); choose another output")
            return
        try:
            before = typed(as_recorded(read_yaml(kept)), type(self.recipe), str(kept))
        except ValueError as error:
            raise ValueError(f"{kept} cannot be read as a recipe ({error}); choose another "
                             "output") from None
        changes = self._changes(before)
        if changes:
            raise ValueError(f"output={self.root} holds another recipe's run: "
                             f"{'; '.join(changes)}. Choose another output, or set these back to "
                             "go on with that run (it can be lengthened where it has one stage, "
                             "masks that stay and optimizer.decay=constant; "
                             "tools/convert_checkpoint.py branch makes a run of another length "
                             "or decay)")

    def _changes(self, before: Recipe | Finetune) -> list[str]:
        """Differences of this start from the last, inputs by their content where that is known."""
        kept = self.root / CONTENTS
        recorded = read_json(kept, dict[str, str], remedy="remove it if the data are those of the "
                             "run's last start") if kept.is_file() else {}
        known = recorded.keys() & self.contents.keys()
        same = {key for key in known if recorded[key] == self.contents[key]}
        changes = changes_of_run(before, self.recipe, longer=True, same=same)
        if isinstance(self.recipe, Recipe) and self.recipe.data.on_blend_change == "continue":
            known -= {"data.train", "data.blend"}
        # a run goes on as it began, whatever its start has become since
        changed = sorted(key for key in known - same - {"checkpoint"}
                         if not any(said.startswith(f"{key} is ") for said in changes))
        return changes + [f"{key} has another content than at the last start" for key in changed]

    def _check_writable(self) -> None:
        """Raises a ValueError where this user could not go on with the run that is there."""
        for path in (self.checkpoints, self.tensorboard, self.log):
            needed = os.W_OK | (os.X_OK if path.is_dir() else 0)
            if path.exists() and not os.access(path, needed):
                raise ValueError(f"output={self.root}: {path.name} is read-only for this user, as "
                                 "where another one began the run; let this user write it (chmod, "
                                 "chown), or choose another output")

    def _check_links(self) -> None:
        """Raises a ValueError where the run would write through a link to another place, or to a
        pipe. Saved checkpoints that the user has moved to another disk and linked are no such
        place."""
        for link in links_out(self.root) if self.root.is_dir() else []:
            if link == self.checkpoints and store.may_be_elsewhere(link):
                continue
            raise ValueError(f"output={self.root}: {link.name} is a link to "
                             f"{os.path.realpath(link)}, and a run writes to its own directory "
                             "only; remove the link, or choose another output")
        for path in self.root.iterdir() if self.root.is_dir() else []:
            if not (path.is_file() or path.is_dir()):  # whoever opens a pipe may wait for ever
                raise ValueError(f"output={self.root}: {path.name} is neither a file nor a "
                                 "directory; remove it, or choose another output")
        store.require_present(self.checkpoints)

    def take(self) -> None:
        """Takes the directory for this process, which is rank 0, or notes in `held` who has it.

        Raises:
            ValueError: the directory cannot be written, or does not pass `check` any more.
        """
        with self._writing():
            try:
                self.lock.take()
            except Held as error:
                self.held = str(error)
                return
        try:
            self.check()  # another process may have begun a run since
        except ValueError:
            self.lock.let_go()
            raise

    def require_taken(self) -> None:
        """Raises a ValueError on all joined ranks alike where another process has the directory."""
        held = [self.held]
        dist.broadcast_object_list(held, src=0)
        if held[0]:
            raise Held(held[0])

    def preflight(self) -> None:
        """Counts a start, once before the ranks of a batch job, and makes the directory.

        Raises:
            ValueError: the directory cannot be written, or the newest checkpoint is not one that a
                run goes on from, as far as the record of it and the sizes of its files tell.
            RestartLimit: too many starts in a row made no checkpoint.
        """
        if there := store.visible(self.checkpoints):
            store.verify(there[-1], checksums=False)
            read_run_record(there[-1] / store.RUN)
        with self._writing():
            restarts.count_start(self.root, self.recipe.fault_tolerance.max_starts)

    def create(self) -> None:
        """Makes the directory and writes the recipe into it.

        Raises:
            ValueError: the directory cannot be written.
        """
        with self._writing():
            self.root.mkdir(parents=True, exist_ok=True)
            save_recipe(self.recipe, self.root / RECIPE)
            write_json(self.root / CONTENTS, self.contents)

    def create_on_rank_0(self) -> None:
        """Calls `create` on rank 0 and waits until every rank sees the directory. All ranks call.

        Raises:
            ValueError: on all ranks alike: it cannot be written, or some ranks do not see it.
        """
        fault = [""]
        if dist.get_rank() == 0:
            try:
                self.create()
            except ValueError as error:
                fault = [str(error)]
        dist.broadcast_object_list(fault, src=0)
        if fault[0]:
            raise ValueError(fault[0])
        check_shared(self.root)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"output={self.root} cannot be written: {error}; choose another "
                             "output") from None

    def _others(self) -> Iterator[Path]:
        """Files in the directory that no run of ours writes before its first `create`."""
        return (p for p in self.root.iterdir()
                if p.name != restarts.STARTS and not is_lock(p.name) and not p.name.endswith(NEW))


def _end_at_once(reason: str) -> None:
    """Ends this process, which must write no more."""
    print(f"stopped: {reason}", file=sys.stderr, flush=True)
    os._exit(GUARD_STOPPED)
