"""The run directory: one recipe's run, and everything that run writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_spdf.checkpoint.shared_files import check_shared
from megatron_spdf.files import NEW, links_out
from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.load import save_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience import restarts

RECIPE = "recipe.yaml"


class RunDir:
    """Paths of a run; `check` before a device is touched, `create` once on rank 0.

    Args:
        recipe: `recipe.output` names the directory.
    """

    def __init__(self, recipe: Recipe | Finetune):
        self.recipe = recipe
        self.root = Path(recipe.output)
        self.checkpoints = self.root / "checkpoints"
        self.log = self.root / "log.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.cache = Path(getattr(recipe.data, "index_cache", None) or self.root / "cache")

    def check(self) -> None:
        """Refuses a directory that holds another recipe's run, or something that is no run, or
        cannot be written.

        Raises:
            ValueError: naming each key that differs, with both values.
        """
        kept = self.root / RECIPE
        root = self.root.absolute()
        there = next(p for p in (root, *root.parents) if p.exists())
        if (
            not there.is_dir()
            and there != root
            or there.is_dir()
            and not os.access(there, os.W_OK | os.X_OK)
        ):
            raise ValueError(f"output={self.root} cannot be written: {there} is "
                             f"{'read-only for this user' if there.is_dir() else 'a file'}; choose "
                             "another output")
        if self.root.is_dir() and (links := links_out(self.root)):
            raise ValueError(f"output={self.root}: {links[0].name} is a link to "
                             f"{links[0].resolve()}, and a run writes to its own directory only; "
                             "remove the link, or choose another output")
        if not kept.is_file():
            if self.root.exists() and (not self.root.is_dir() or any(self._others())):
                raise ValueError(f"output={self.root} exists and is not a run directory (it has no "
                                 f"{RECIPE}); choose another output")
            return
        try:
            before = type(self.recipe).model_validate(yaml.safe_load(kept.read_text()))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"{kept} cannot be read as a recipe ({error}); choose another output"
            ) from None
        changes = changes_of_run(before, self.recipe)
        if changes:
            raise ValueError(f"output={self.root} holds another recipe's run: "
                             f"{'; '.join(changes)}. Choose another output, or set these back to "
                             "go on with that run")

    def preflight(self) -> None:
        """Counts a start, once before the ranks of a batch job; the directory exists afterwards.

        Raises:
            ValueError: the directory cannot be written.
            RestartLimit: too many starts in a row made no checkpoint.
        """
        try:
            restarts.count_start(self.root, self.recipe.fault_tolerance.max_starts)
        except OSError as error:
            raise ValueError(
                f"output={self.root} cannot be written: {error}; choose another output"
            ) from None

    def create(self) -> None:
        """Creates the directory and keeps the recipe in it.

        Raises:
            ValueError: the directory cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            save_recipe(self.recipe, self.root / RECIPE)
        except OSError as error:
            raise ValueError(
                f"output={self.root} cannot be written: {error}; choose another output"
            ) from None

    def create_on_rank_0(self) -> None:
        """`create` on rank 0; all ranks call, and see the directory afterwards.

        Raises:
            ValueError: it cannot be written, or some ranks do not see it; on all ranks alike.
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

    def _others(self) -> Iterator[Path]:
        """What is in the directory before the first start of a run claims it, and not of this
        run."""
        return (p for p in self.root.iterdir()
                if p.name != restarts.STARTS and not p.name.endswith(NEW))
