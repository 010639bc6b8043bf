"""Trunks of a grid: runs that differ in their length alone share their steps at the peak of the
learning rate.

Where the rate falls at the end only (`optimizer.decay_share` below 1, WSD), the longest run of a
cell is the trunk of the shorter ones. It saves where their rates begin to fall, and they begin
there. A branch equals, to the last digit at the same layout, the run that goes all the way alone;
what was begun so may be run again without a trunk.

A run goes alone where its trunk would have trained otherwise up to that step (gradual pruning, a
fraction that anneals; see `recipe/compare.py`), or has no checkpoint there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_spdf.checkpoint import store
from megatron_spdf.recipe.compare import AFTER_THE_PEAK, changes_so_far
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.grid import Trial
from megatron_spdf.runs.measured import RECIPE


@dataclass(frozen=True)
class Run:
    """A run of a grid.

    Attributes:
        trunk: run that it branches off; None: it goes alone.
        begin: step of the trunk at which it does.
        keep: steps at which runs branch off this one.
    """

    trial: Trial
    recipe: Recipe
    trunk: Path | None = None
    begin: int = 0
    keep: list[int] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """Overrides of the run as a trunk, beside those of its trial."""
        kept = sorted({*self.keep, *self.recipe.checkpoint.keep_at})
        return [f"checkpoint.keep_at={json.dumps(kept)}"] if self.keep else []

    def prepare(self) -> bool:
        """Makes the run directory of a branch, unless there is one, or no checkpoint for it.

        Returns:
            True: it may be run.

        Raises:
            ValueError: that checkpoint cannot be branched from.
        """
        if self.trunk is None or (self.trial.output / RECIPE).is_file():
            return True
        checkpoint = self.trunk / "checkpoints" / store.name_of(self.begin)
        if checkpoint.is_dir():
            # Here, as they import the engines, which takes seconds.
            from megatron_spdf.checkpoint.reader import CheckpointReader
            from megatron_spdf.convert.reshard import branch

            branch(CheckpointReader(checkpoint, checksums=True), self.recipe, self.trial.output)
        else:
            print(f"{self.trial.output} goes alone, as there is no {checkpoint}", flush=True)
        return True


def with_trunks(planned: Iterable[tuple[Trial, Recipe]]) -> list[list[Run]]:
    """Runs in chains, each a trunk and its branches from the longest to the shortest, or a run that
    goes alone.

    Args:
        planned: runs with their recipes; chains are in the order of their first ones.
    """
    families: dict[str, list[tuple[Trial, Recipe]]] = {}
    for trial, recipe in planned:
        families.setdefault(_family(trial, recipe), []).append((trial, recipe))
    return [chain for family in families.values() for chain in _chains(family)]


def _family(trial: Trial, recipe: Recipe) -> str:
    """What runs have in common that may share steps; a key for each run that shares none."""
    if recipe.optimizer.decay_share == 1.0 or recipe.stages:
        return str(trial.output)
    shared = recipe.identity()
    for key in AFTER_THE_PEAK:
        section, name = key.split(".")
        shared[section].pop(name)
    return json.dumps(shared, sort_keys=True, default=str)


def _chains(family: list[tuple[Trial, Recipe]]) -> list[list[Run]]:
    (trunk, longest), *shorter = sorted(family, key=lambda each: -each[1].steps)
    branches, alone = [], []
    for trial, recipe in shorter:
        begin = recipe.steps - recipe.decay_tokens // recipe.tokens_per_step
        if begin > 0 and not changes_so_far(longest, recipe, begin):
            branches.append(Run(trial, recipe, trunk.output, begin))
        else:
            alone.append([Run(trial, recipe)])
    keep = sorted({run.begin for run in branches})
    return [[Run(trunk, longest, keep=keep), *branches], *alone]
