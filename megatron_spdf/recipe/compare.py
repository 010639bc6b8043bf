"""How two recipes differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.recipe import Recipe

# What recipes name by a path, and another path may be the same thing.
INPUTS = ("data.train", "data.blend", "data.valid", "data.path", "checkpoint")


def changes_of_run(before: Recipe | Finetune, now: Recipe | Finetune, longer: bool = False,
                   same: Collection[str] = ()) -> list[str]:
    """One phrase for every value that two starts of one run must share and do not.

    The training data of a pre-training run may change where `data.on_blend_change` of the second is
    "continue".

    Args:
        longer: let the second train for more tokens or epochs, where no step depends on their
            number: at a constant learning rate after the warm-up, with one stage and masks that do
            not move.
        same: those of `INPUTS` whose content is known to be the same, whatever their paths.
    """
    there, here = before.identity(), now.identity()
    if longer and _goes_on_alike(now):
        for key in ("tokens", "epochs"):
            if there["train"].get(key, 0) < here["train"].get(key, 0):
                there["train"].pop(key), here["train"].pop(key)
    if isinstance(now, Recipe) and now.data.on_blend_change == "continue":
        for key in ("train", "blend"):  # data/blend.py keeps the blends of a run
            there["data"].pop(key), here["data"].pop(key)
    return [said for key, said in _differences(there, here) if key not in same]


def _goes_on_alike(recipe: Recipe | Finetune) -> bool:
    moves = isinstance(recipe, Recipe) and (
        bool(recipe.stages) or recipe.sparsity.algorithm != "static")
    return recipe.optimizer.decay == "constant" and not moves


def _differences(there: Any, here: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Key and phrase of each, of two nested mappings, in the order of the first."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key), here.get(key),
                                    f"{place}.{key}" if place else key)
    elif there != here:
        yield place, f"{place} is {there} there and {here} here"
