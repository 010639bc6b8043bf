"""How two recipes differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.recipe import Recipe

# What recipes name by a path, and another path may be the same thing.
INPUTS = ("data.train", "data.blend", "data.valid", "data.path", "checkpoint",
          "distill.teacher")


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


# What a run may have otherwise from a step at the peak of the learning rate on.
AFTER_THE_PEAK = ("train.tokens", "optimizer.decay", "optimizer.decay_share",
                  "optimizer.min_lr_ratio")


def changes_so_far(before: Recipe, now: Recipe, step: int) -> list[str]:
    """One phrase for every value of a pre-training run that its first steps depend on and that is
    another in a second recipe.

    The length of a run and the fall of its learning rate are no such values while the rate is at
    its peak, in both, and masks have moved alike.
    """
    changed = dict(_differences(before.identity(), now.identity()))
    later = {key: changed.pop(key) for key in AFTER_THE_PEAK if key in changed}
    if later and before.stages:
        changed |= later  # where a stage ends depends on the run's length
    elif later:
        ends = {place: recipe.steps - recipe.decay_tokens // recipe.tokens_per_step
                for place, recipe in (("there", before), ("here", now))}
        changed |= {place: f"the learning rate falls from step {end:,} on {place}"
                    for place, end in ends.items() if end < step}
        if not now.sparsity.update.alike_until(step, before.steps, now.steps):
            changed["masks"] = (f"up to step {step:,} masks move otherwise in {before.steps:,} "
                                f"steps than in {now.steps:,}")
    return list(changed.values())


def _goes_on_alike(recipe: Recipe | Finetune) -> bool:
    moves = isinstance(recipe, Recipe) and (
        bool(recipe.stages) or not recipe.sparsity.update.stays)
    return recipe.optimizer.decay == "constant" and not moves


def _differences(there: Any, here: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Key and phrase of each, of two nested mappings, in the order of the first."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key), here.get(key),
                                    f"{place}.{key}" if place else key)
    elif there != here:
        yield place, f"{place} is {there} there and {here} here"
