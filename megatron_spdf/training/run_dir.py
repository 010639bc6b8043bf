"""The run directory: one recipe's run, and everything that run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_spdf.config import Recipe, save_recipe

RECIPE = "recipe.yaml"


class RunDir:
    """Paths of a run; `check` before a device is touched, `claim` once on rank 0.

    Args:
        recipe: `recipe.output` names the directory.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.root = Path(recipe.output)
        self.checkpoints = self.root / "checkpoints"
        self.log = self.root / "log.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.cache = Path(recipe.data.cache or self.root / "cache")

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
            before = Recipe.model_validate(yaml.safe_load(kept.read_text())).identity()
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{kept} cannot be read as a recipe ({error}); choose another output") from None
        now = self.recipe.identity()
        if self.recipe.data.on_blend_change == "continue":
            for key in ("train", "blend"):  # data/blend.py keeps the blends of a run
                before["data"].pop(key), now["data"].pop(key)
        changes = list(_differences(before, now))
        if changes:
            raise ValueError(f"output={self.root} holds another recipe's run: {'; '.join(changes)}. Choose another "
                             "output, or set these back to go on with that run")

    def claim(self) -> None:
        """Creates the directory and keeps the recipe in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        beside = self.root / f"{RECIPE}.new"
        save_recipe(self.recipe, beside)
        beside.replace(self.root / RECIPE)


def _differences(before: Any, now: Any, place: str = ""):
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else key)
    elif before != now:
        yield f"{place} is {before} there and {now} here"
