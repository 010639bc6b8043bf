"""Experiments: a grid of pre-training runs, each combination with every seed, and its results.

    recipe: ../pretrain/gpt_tiny.yaml        # relative to this file
    output: runs/experiments/transfer
    seeds: [1, 2, 3]                         # of weights, data order and masks
    axes:                                    # the last varies fastest
      parametrization: [standard, mup]       # a key of the recipe and its values,
      width:                # or any name, and for each label the keys and values that it stands for
        64: {model.hidden: 64, model.heads: 2}
        128: {model.hidden: 128, model.heads: 4}
      optimizer.lr: [1e-3, 2e-3]
    exclude:                               # combinations that are left out: those with these labels
      - {width: 64, optimizer.lr: 1e-3}
    plot: {x: optimizer.lr, lines: width, panels: [parametrization]}

Labels may also size a run by what it costs (`budget: flops`, `tokens_per_weight: 20`), see
`budget.py`.

`finetune:` fine-tunes and scores every run, see `downstream.py`.

`tune: {optimizer.lr: 2}` tunes keys of every cell before it is run with all seeds, from where
`begin:` says or from their own values on, see `tuning.py`.
Runs that differ in their length alone share their steps at the peak of the learning rate, see
`trunks.py`. `hold_out:` names cells that no law is fitted to, see `loss_table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

from pydantic import Field, model_validator
from scipy.stats import t as student

from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.load import load_recipe, write_value
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.words import first_given
from megatron_spdf.records.yaml_reader import read_yaml
from megatron_spdf.runs.budget import sized
from megatron_spdf.runs.downstream import Downstream
from megatron_spdf.runs.grid import Trial, combinations, labeled_axes, require_labels
from megatron_spdf.runs.measured import LOG, Evaluated, NotBegun, Versions, read_run, versions_of
from megatron_spdf.schedule.stages import mean_flops, stages_of
from megatron_spdf.section import PathText, Section
from megatron_spdf.tables import Column, Table

Ended = dict[int, Evaluated]  # seed -> record of the last evaluation of a run, at its end
NAMING = ("exclude", "hold_out", "baseline")  # keys that name cells by labels


class Plot(Section):
    """Axes of the picture. Those that it does not name are drawn as further lines."""

    x: str = Field(description="axis along which the loss is drawn")
    lines: str | None = Field(None, description="axis with a line for each of its labels")
    panels: list[str] = Field([], description="axes with a picture for each combination of labels")
    curves: str | None = Field(None, description="axis with a learning curve for each of its "
                                                 "labels, in a second picture; default: none")
    frontiers: list[str] = Field([], description="labels of `lines` whose losses are drawn against "
                                                 "training FLOPs, in a picture of its own; `x` is "
                                                 "then the axis of lengths; default: none")


class Begin(Section):
    """Where the searches of some cells begin."""

    cells: dict[str, str] = Field(description="axis -> label; cells that have them all")
    factors: dict[str, int] = Field(min_length=1, description="key of `tune` -> power of its "
                                    "factor that the cell's own value is multiplied by")


class Experiment(Section):
    """Experiment, as a file of configs/experiments describes it."""

    recipe: PathText = Field(description="pre-training recipe that every run starts from, relative "
                                         "to this file")
    output: PathText = Field(description="directory of the runs and of the results")
    seeds: list[int] = Field(min_length=1, description="each cell is run with every one of them")
    axes: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1,
                                                       description="name -> label -> key -> value")
    exclude: list[dict[str, str]] = Field(
        [], description="axis -> label; what has them all is left out"
    )
    hold_out: list[dict[str, str]] = Field(
        [], description="axis -> label; to what has them all no law is fitted, but its loss is "
                        "predicted"
    )
    baseline: dict[str, str] | None = Field(
        None, description="axis -> label; every cell is compared, seed by seed, with that which "
                          "has these labels instead"
    )
    tune: dict[str, Annotated[float, Field(gt=1.0)]] = Field(
        {}, description="key of the recipe -> factor between neighboring values; every cell is "
                        "tuned with the first seed, from its own value on")
    begin: list[Begin] = Field([], description="cells whose search begins away from their own "
                                               "values; of several entries for one the last counts")
    finetune: Downstream | None = Field(
        None, description="fine-tuning of every run, and its scores; default: none"
    )
    plot: Plot

    @model_validator(mode="before")
    @classmethod
    def _short_axes(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("axes"), dict):
            return values
        def named(labels: Any) -> Any:
            if isinstance(labels, list):
                return list(map(named, labels))
            return {axis: write_value(label) if isinstance(values["axes"].get(axis), list)
                    else str(label)
                    for axis, label in labels.items()} if isinstance(labels, dict) else labels

        naming = {key: named(values[key]) for key in NAMING if key in values}
        if isinstance(begin := values.get("begin"), list):
            naming["begin"] = [{**entry, "cells": named(entry["cells"])}
                               if isinstance(entry, dict) and "cells" in entry else entry
                               for entry in begin]
        return {**values, "axes": labeled_axes(values["axes"]), **naming}

    @model_validator(mode="after")
    def _is_a_grid(self) -> Experiment:
        if twice := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ValueError(f"seeds has {twice[0]} twice, which is one run; leave one out")
        if both := self.tune.keys() & self.axes.keys():
            raise ValueError(f"{min(both)} is an axis and to be tuned; leave out one of the two")
        if self.finetune and self.tune:
            raise ValueError("a grid with tune has no runs to fine-tune before its searches end; "
                             "make another grid of the points that were chosen")
        if self.finetune:
            self.finetune.check_labels(self.axes)
        return self

    @model_validator(mode="after")
    def _labels_are_there(self) -> Experiment:
        for key in NAMING:
            named = getattr(self, key) or []
            for labels in [named] if isinstance(named, dict) else named:
                if not labels:
                    raise ValueError(f"{key} has an entry without labels, which all cells have; "
                                     "name labels there, or leave it out")
                require_labels(key, labels, self.axes)
        for begin in self.begin:
            require_labels("begin", begin.cells, self.axes)
            if strange := begin.factors.keys() - self.tune.keys():
                raise ValueError(f"begin.factors has {min(strange)}, and the keys of tune are "
                                 f"{', '.join(self.tune) or 'none'}; take some of them")
        return self

    @model_validator(mode="after")
    def _plot_names_axes(self) -> Experiment:
        unknown = {self.plot.x, self.plot.lines, self.plot.curves, *self.plot.panels} - {
            None, *self.axes}
        if unknown:
            raise ValueError(f"plot names {', '.join(sorted(map(str, unknown)))}, and the axes are "
                             f"{', '.join(self.axes)}; take one of them")
        labels = self.axes[self.plot.lines] if self.plot.lines else {}
        if strange := [label for label in self.plot.frontiers if label not in labels]:
            raise ValueError(f"plot.frontiers names {strange[0]}, and the labels of lines are "
                             f"{', '.join(labels) or 'none, as plot.lines is not given'}; take "
                             "some of them")
        return self


@dataclass(frozen=True)
class Cell:
    """One combination of labels.

    Attributes:
        labels: axis -> label.
        trials: seed -> run.
        recipes: seed -> recipe of the run.
        known: ends of runs that another machine has made (`known.py`).
    """

    labels: dict[str, str]
    trials: dict[int, Trial]
    recipes: dict[int, Recipe]
    known: Ended = field(default_factory=dict)

    def ended(self, seed: int) -> Evaluated | None:
        """Record of the last evaluation of a run, at its end; None if the run or the loss is not
        finite. The run directory comes before what is known.

        Raises:
            ValueError: see `end_of`.
        """
        return end_of(self.trials[seed], self.recipes[seed]) or self.known.get(seed)

    def loss(self, seed: int) -> float | None:
        """Validation loss at the end of a run, likewise."""
        ended = self.ended(seed)
        return ended["loss"] if ended else None


def load_experiment(path: Path) -> Experiment:
    """Reads the file of an experiment.

    Raises:
        ValueError: naming the keys that are wrong.
    """
    return read_yaml(path, Experiment, remedy="see configs/experiments")


def nothing_known(cell: Cell) -> Ended:
    """No end of a run is known."""
    return {}


def cells(experiment: Experiment, path: Path, words: list[str],
          known: Callable[[Cell], Ended] = nothing_known) -> list[Cell]:
    """Every combination with its runs, whose recipes are checked.

    Args:
        path: file of the experiment.
        words: overrides for every run.
        known: see `Cell`.

    Raises:
        ValueError: the recipe of a run is not valid.
    """
    recipe = path.parent / experiment.recipe
    return [make_cell(trial, experiment.seeds, recipe, words, known)
            for trial in trials(experiment)]


def trials(experiment: Experiment) -> list[Trial]:
    """The combinations that are not left out.

    Raises:
        ValueError: none is left, or see `combinations`.
    """
    kept = [trial for trial in combinations(experiment.axes, experiment.output)
            if not any(left_out.items() <= trial.labels.items()
                       for left_out in experiment.exclude)]
    if not kept:
        raise ValueError("exclude leaves no combination to run; exclude fewer")
    return kept


def make_cell(trial: Trial, seeds: list[int], recipe: Path, words: list[str],
              known: Callable[[Cell], Ended] = nothing_known) -> Cell:
    """A combination with its runs.

    Args:
        recipe: file that every run starts from.
        known: see `Cell`.

    Raises:
        ValueError: see `cells`; or an override is of a key that the run has a value for.
    """
    own = {"seed", "sparsity.seed"}
    if both := trial.values.keys() & own:
        raise ValueError(f"{min(both)} is given by seeds, and {trial.labels} would give another; "
                         "leave it out of the axes")
    if both := first_given(words, {*trial.values, *own, "output"}):
        raise ValueError(f"{both}: every run of the grid has a value of its own; change the "
                         "grid's file, or leave this word out")
    values = with_size(trial, trial.values, recipe, words)
    seeded = {seed: replace(trial, values={**values, "seed": seed, "sparsity.seed": seed},
                            output=trial.output / f"seed={seed}") for seed in seeds}
    first = load_recipe(recipe, [*words, *seeded[seeds[0]].words])
    cell = Cell(trial.labels, seeded, {seed: _with_seed(first, seed, seeded[seed].output)
                                       for seed in seeds})
    return replace(cell, known=known(cell))


def _with_seed(recipe: Recipe, seed: int, output: Path) -> Recipe:
    """A valid recipe with other seeds, of which no rule says anything."""
    sparsity = recipe.sparsity.model_copy(update={"seed": seed})
    return recipe.model_copy(update={"seed": seed, "sparsity": sparsity, "output": str(output)})


def with_size(trial: Trial, values: dict[str, Any], recipe: Path,
              words: list[str]) -> dict[str, Any]:
    """Values of a run whose size is that of its budget.

    Args:
        recipe: file that every run starts from.
        words: overrides for every run.

    Raises:
        ValueError: see `cells`.
    """
    return sized(values, lambda own: load_recipe(
        recipe, [*words, *replace(trial, values=own).words]))


def end_of(trial: Trial, recipe: Recipe) -> Evaluated | None:
    """Record of the last evaluation of a run, at its end; None if the run or the loss is not
    finite.

    Raises:
        ValueError: the directory holds another recipe's run, or a damaged log.
    """
    if not (trial.output / LOG).is_file():
        return None
    found = _end_there(trial.output, versions_of(trial.output))
    if found is None:
        return None
    there, ended = found
    changes = changes_of_run(there, recipe)
    if changes:
        raise ValueError(f"{trial.output} holds another recipe's run: {'; '.join(changes)}. Choose "
                         "another output, or remove it")
    return ended


@cache  # a grid is asked for the ends of its runs again and again, and a log is long
def _end_there(output: Path, versions: Versions) -> tuple[Recipe, Evaluated | None] | None:
    """Recipe and end of the run in a directory; None: there is not a step yet.

    Args:
        versions: of its files, for which what was found holds.
    """
    try:
        run = read_run(output)
    except NotBegun:
        return None
    ended = [r for r in run.valid if r["step"] == run.recipe.steps]
    return run.recipe, ended[-1] if ended and ended[-1]["loss"] is not None else None


def results(grid: list[Cell]) -> list[dict[str, Any]]:
    """Results of every cell, as plain values.

    Returns:
        For each cell: `labels`, `tokens`, `flops`, `losses` by seed, `missing` runs, `mean`, and
        `interval`, half the width of the 95% confidence interval of the mean (Student's t over
        seeds; None for fewer than two).
    """
    return [result(cell) for cell in grid]


def result(cell: Cell) -> dict[str, Any]:
    """Results of a cell, see `results`."""
    losses = {seed: loss for seed in cell.trials if (loss := cell.loss(seed)) is not None}
    stages = stages_of(next(iter(cell.recipes.values())))  # seeds change nothing in them
    tokens = sum(stage.tokens for stage in stages)
    center, interval = summary(list(losses.values()))
    return {"labels": cell.labels, "tokens": tokens, "flops": mean_flops(stages).total * tokens,
            "losses": losses, "missing": len(cell.trials) - len(losses), "mean": center,
            "interval": interval}


def summary(losses: list[float]) -> tuple[float | None, float | None]:
    """Mean, and half the width of its 95% confidence interval (None for fewer than two)."""
    if not losses:
        return None, None
    if len(losses) == 1:
        return losses[0], None
    return mean(losses), float(student.ppf(0.975, len(losses) - 1)) * stdev(losses) / math.sqrt(
        len(losses)
    )


def render(experiment: Experiment, rows: list[dict[str, Any]],
           beside: Sequence[Column] = ()) -> str:
    """Markdown table of the rows.

    Args:
        beside: columns after that of the loss.
    """
    columns = [*(Column(axis, lambda row, axis=axis: row["labels"][axis])
                 for axis in [*experiment.axes, *experiment.tune]),
               Column("tokens", form=","), Column("FLOPs", "flops", ".4g"),
               Column("validation loss", _render_loss, align="right"), *beside,
               Column("seeds", _render_seeds, align="right")]
    said = " Differences are those of the same seeds, likewise." if beside else ""
    return (f"{Table(columns, rows).markdown()}\n\nNats per token at the end of the run; mean and "
            f"95% confidence interval over seeds.{said}\n")


def _render_loss(row: dict[str, Any]) -> str | None:
    if row["mean"] is None:
        return None
    interval = "" if row["interval"] is None else f" ± {row['interval']:.4f}"
    return f"{row['mean']:.4f}{interval}"


def _render_seeds(row: dict[str, Any]) -> str:
    done, missing = len(row["losses"]), row["missing"]
    return f"{done} of {done + missing}" if missing else str(done)
