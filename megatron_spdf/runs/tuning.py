"""Tuning of the cells of an experiment: each gets the values of some keys that it does best with.

    axes:
      masks:
        dense: {sparsity.level: 0, optimizer.lr: 2e-3, optimizer.embedding_lr: 2e-2}
        75%: {sparsity.level: 0.75, optimizer.lr: 8e-3, optimizer.embedding_lr: 2e-2}
    tune: {optimizer.lr: 2, optimizer.embedding_lr: 2}
    begin:                                     # half the rate, where a guess is at hand
      - {cells: {masks: 75%}, factors: {optimizer.lr: -1}}

A cell begins at its own values, or as far from them as `begin` says. It is run there and at the
neighbors, one key times or over its factor, with the first seed, and goes to the best of them,
until no neighbor is better. So no best value lies at the edge of what was tried, and the table of
neighbors shows it. There the cell is run with the other seeds.

The search follows from the losses alone: interrupted, it goes on, since what was run is not run
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_spdf.recipe.load import load_recipe, write_value
from megatron_spdf.runs.experiment import (
    Cell,
    Ended,
    Experiment,
    make_cell,
    nothing_known,
    result,
    trials,
    with_size,
)
from megatron_spdf.runs.grid import Trial, directory_name
from megatron_spdf.tables import Column, Table

Point = tuple[int, ...]  # powers of the factors by which the keys differ from the cell's own values


def neighbors(point: Point) -> Iterator[Point]:
    """Points that differ in one key by one factor."""
    for place in range(len(point)):
        for step in (-1, 1):
            yield (*point[:place], point[place] + step, *point[place + 1:])


def search(start: Point, loss: Callable[[Point], float | None]) -> tuple[Point, list[Point]]:
    """The best point that is known, and the points whose loss has to be known to go on; none: no
    neighbor is better.

    Args:
        loss: infinite where a run has no result; None: not known.
    """
    center = start
    while True:
        around = [center, *neighbors(center)]
        found = {point: value for point in around if (value := loss(point)) is not None}
        unknown = [point for point in around if point not in found]
        best = min(found, key=found.get, default=center)  # the center, where losses are equal
        if unknown or best == center:
            return best, unknown
        center = best


@dataclass
class TunedCell:
    """Cell of an experiment that is tuned.

    Args:
        trial: the combination of labels.
        recipe: file that every run starts from.
        words: overrides for every run.
        known: see `experiment.Cell`.

    A run that was tried and has no loss, as one that diverges, is the worst; `tried` are the
    directories of those that were.
    """

    experiment: Experiment
    trial: Trial
    recipe: Path
    words: list[str]
    known: Callable[[Cell], Ended] = nothing_known

    def __post_init__(self):
        values = with_size(self.trial, self.trial.values, self.recipe, self.words)
        begun = load_recipe(self.recipe, [*self.words, *replace(self.trial, values=values).words]
                            ).model_dump()
        self._own = {key: _value(begun, key) for key in self.experiment.tune}
        self._cells: dict[Point, Cell] = {}
        self.begin: Point = (0,) * len(self._own)
        for begin in self.experiment.begin:
            if begin.cells.items() <= self.trial.labels.items():
                self.begin = tuple(begin.factors.get(key, 0) for key in self._own)

    def at(self, point: Point) -> Cell:
        """The cell with the values of a point."""
        if point not in self._cells:
            tuned = {key: float(f"{self._own[key] * factor**power:.6g}") for power, (key, factor)
                     in zip(point, self.experiment.tune.items(), strict=True)}
            labels = {**self.trial.labels, **{k: write_value(v) for k, v in tuned.items()}}
            trial = replace(self.trial, labels=labels, values={**self.trial.values, **tuned},
                            output=self.trial.output.parent / directory_name(labels))
            self._cells[point] = make_cell(trial, self.experiment.seeds, self.recipe, self.words,
                                           self.known)
        return self._cells[point]

    def loss(self, point: Point, tried: Collection[Path]) -> float | None:
        """Loss with the first seed; infinite where the run was tried in vain, or a recipe cannot
        have such a value."""
        seed = self.experiment.seeds[0]
        try:
            cell = self.at(point)
        except ValueError:
            return math.inf
        found = cell.loss(seed)
        return math.inf if found is None and cell.trials[seed].output in tried else found

    def search(self, tried: Collection[Path]) -> tuple[Point, list[Point]]:
        """See the function."""
        return search(self.begin, lambda point: self.loss(point, tried))

    def left(self, tried: Collection[Path]) -> list[Trial]:
        """The runs that can be done now: those the search asks for, and then those of the other
        seeds."""
        best, unknown = self.search(tried)
        if unknown:
            return [self.at(point).trials[self.experiment.seeds[0]] for point in unknown]
        cell = self.at(best)
        return [trial for seed, trial in cell.trials.items() if trial.output not in tried
                and cell.loss(seed) is None]

    @property
    def seen(self) -> list[Cell]:
        """The cells of all points that were looked at so far, with a loss or not."""
        return [*self._cells.values()]

    def best(self, tried: Collection[Path]) -> Cell:
        """The cell at the best point so far."""
        return self.at(self.search(tried)[0])

    def result(self, tried: Collection[Path]) -> dict[str, Any]:
        """Result of `experiment.result` at the best point so far, with `tried`, the number of
        points, `searching`, that of those still to be tried at least, and `neighbors`: the loss
        with the first seed at the best point and beside it, key -> [below, there, above]."""
        best, unknown = self.search(tried)
        beside = list(neighbors(best))
        losses = {point: value if (value := self.loss(point, tried)) != math.inf else None
                  for point in [best, *beside]}
        return {**result(self.at(best)),
                "tried": sum(self.loss(point, tried) is not None for point in [*self._cells]),
                "searching": len(unknown),
                "neighbors": {key: [losses[beside[2 * n]], losses[best], losses[beside[2 * n + 1]]]
                              for n, key in enumerate(self._own)}}


def tuned_cells(experiment: Experiment, path: Path, words: list[str],
                known: Callable[[Cell], Ended] = nothing_known) -> list[TunedCell]:
    """The cells of an experiment that tunes.

    Args:
        path: file of the experiment.
        known: see `experiment.Cell`.

    Raises:
        ValueError: see `experiment.cells`; or a key to tune is no number in a cell.
    """
    found = []
    for trial in trials(experiment):
        found.append(TunedCell(experiment, trial, path.parent / experiment.recipe, words,
                               known))
        found[-1].at(found[-1].begin)
    return found


def render_neighbors(experiment: Experiment, rows: list[dict[str, Any]]) -> str:
    """Markdown table of the losses beside the chosen points."""
    columns = [*(Column(axis, lambda row, axis=axis: row["labels"][axis])
                 for axis in experiment.axes),
               Column("key"), Column("chosen"), Column("below", form=".4f"),
               Column("there", form=".4f"), Column("above", form=".4f"),
               Column("points tried", "tried", "d")]
    beside = [{"labels": row["labels"], "key": key, "chosen": row["labels"][key],
               "below": below, "there": there, "above": above, "tried": row["tried"]}
              for row in rows for key, (below, there, above) in row["neighbors"].items()]
    going_on = [row for row in rows if row["searching"]]
    note = (f"\n{len(going_on)} of {len(rows)} searches have not ended yet.\n" if going_on else "")
    factors = ", ".join(f"{key} {factor:g}" for key, factor in experiment.tune.items())
    return (f"{Table(columns, beside).markdown()}\n\nLosses with seed {experiment.seeds[0]} at the "
            f"chosen point and where one key is a factor below or above: {factors}.\n{note}")


def _value(recipe: dict[str, Any], key: str) -> float:
    """The number that a key of a recipe has.

    Raises:
        ValueError: it has none.
    """
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"tune: {key} is {value!r} in the recipe, and a search begins with a "
                         "number over 0; give it one, in the recipe or in a label")
    return value
