"""Runs of one recipe, which differ in their seeds alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.spdf_table import start_of

SEEDS = ("seed", "sparsity.seed")
OWN = ("output", *SEEDS)  # keys in which runs of one recipe differ


@dataclass(frozen=True)
class SameRecipe:
    """Runs that differ in their seeds alone, or one run.

    Attributes:
        runs: in the order of the page.
    """

    runs: tuple[Logged, ...]

    @property
    def label(self) -> str:
        """What the names of the runs have in common, and how many they are."""
        if len(self.runs) == 1:
            return self.runs[0].label
        words = [re.findall(r"[^\W\d_]+|\d+|[\W_]+", run.label) for run in self.runs]
        common = "".join(os.path.commonprefix(words))
        common = re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", common)
        return f"{common or self.runs[0].directory.parent.name}, {len(self.runs)} seeds"

def flat(values: Any, place: str = "") -> dict[str, str]:
    """Keys of a recipe with their sections, and their values as text; empty sections have none."""
    if not isinstance(values, Mapping):
        return {place: values if isinstance(values, str)
                else json.dumps(values, default=str, ensure_ascii=False)}
    return {key: value for name, inner in values.items()
            for key, value in flat(inner, f"{place}.{name}" if place else str(name)).items()}


def same_recipe(runs: Sequence[Logged]) -> list[SameRecipe]:
    """Puts together runs whose recipes differ in their seeds alone, and that are as far.

    The checkpoint of a fine-tuning run may be another too where it is of runs that differ in their
    seeds alone.
    """
    found: dict[Any, list[Logged]] = {}
    number_of: dict[int, int] = {}
    for run in sorted(runs, key=lambda run: run.fine_tunes is not None):
        start = start_of(run, runs)
        kind = _kind(run, number_of.get(id(start)))
        # A seed that is there already is the same run once more.
        group = next((kind, again) for again in count() if all(
            run.seed != other.seed for other in found.get((kind, again), [])))
        found.setdefault(group, []).append(run)
        number_of[id(run)] = list(found).index(group)
    order = {id(run): place for place, run in enumerate(runs)}
    groups = [SameRecipe(tuple(sorted(group, key=lambda run: order[id(run)])))
              for group in found.values()]
    return sorted(groups, key=lambda group: order[id(group.runs[0])])


def _kind(run: Logged, start: int | None) -> Hashable:
    """What runs of one recipe share: its other keys, and how far they are.

    Args:
        start: number of the group that a fine-tuning run started from.
    """
    keys = {key: value for key, value in flat(run.values).items() if key not in OWN}
    if start is not None:
        keys["checkpoint"] = f"group {start}"
    return (run.train[-1]["step"], run.valid[-1]["step"] if run.valid else None,
            frozenset(keys.items()))
