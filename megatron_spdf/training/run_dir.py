"""The run directory: one recipe's run, and everything that run writes."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_spdf.config import Recipe, changes_of_run, save_recipe
from megatron_spdf.config.finetune import Finetune

RECIPE = "recipe.yaml"


class RunDir:
    """Paths of a run; `check` before a device is touched, `claim` once on rank 0.

    Args:
        recipe: `recipe.output` names the directory.
    """

    def __init__(self, recipe: Recipe | Finetune):
        self.recipe = recipe
        self.root = Path(recipe.output)
        self.checkpoints = self.root / "checkpoints"
        self.log = self.root / "log.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.cache = Path(getattr(recipe.data, "cache", None) or self.root / "cache")

    def check(self) -> None:
        """Refuses a directory that holds another recipe's run, or something that is no run.

        Raises:
            ValueError: naming each key that differs, with both values.
        """
        kept = self.root / RECIPE
        if not kept.is_file():
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise ValueError(f"output={self.root} exists and is not a run directory (it has no {RECIPE}); "
                                 "choose another output")
            return
        try:
            before = type(self.recipe).model_validate(yaml.safe_load(kept.read_text()))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{kept} cannot be read as a recipe ({error}); choose another output") from None
        changes = changes_of_run(before, self.recipe)
        if changes:
            raise ValueError(f"output={self.root} holds another recipe's run: {'; '.join(changes)}. Choose another "
                             "output, or set these back to go on with that run")

    def claim(self) -> None:
        """Creates the directory and keeps the recipe in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        beside = self.root / f"{RECIPE}.new"
        save_recipe(self.recipe, beside)
        beside.replace(self.root / RECIPE)
