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

`budget: flops` among the values of a label lengthens a run until it costs as many FLOPs as the
dense model for the recipe's `train.tokens`.

`tune: {optimizer.lr: 2}` tunes keys of every cell before it is run with all seeds, see `tuning.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

from pydantic import Field, model_validator
from scipy.stats import t as student

from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.load import load_recipe, write_value
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.records import read_yaml
from megatron_spdf.runs.grid import Trial, axis_of, combinations, labeled
from megatron_spdf.runs.measured import LOG, read_run
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.schedule.stages import mean_flops, stages_of
from megatron_spdf.section import PathText, Section
from megatron_spdf.tables import Column, Table

BUDGET = "budget"  # the only key in an axis that is no key of the recipe


class Plot(Section):
    """Axes of the picture. Those that it does not name are drawn as further lines."""

    x: str = Field(description="axis along which the loss is drawn")
    lines: str | None = Field(None, description="axis with a line for each of its labels")
    panels: list[str] = Field([], description="axes with a picture for each combination of labels")


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
    tune: dict[str, Annotated[float, Field(gt=1.0)]] = Field(
        {}, description="key of the recipe -> factor between neighboring values; every cell is "
                        "tuned with the first seed, from its own value on")
    plot: Plot

    @model_validator(mode="before")
    @classmethod
    def _short_axes(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("axes"), dict):
            return values
        axes = {name: axis_of(name, axis) if isinstance(axis, list)
                else labeled(name, axis.items()) if isinstance(axis, dict)
                else axis
                for name, axis in values["axes"].items()}
        exclude = values.get("exclude", [])
        if isinstance(exclude, list):
            exclude = [{axis: write_value(label) if isinstance(values["axes"].get(axis), list)
                        else str(label) for axis, label in labels.items()}
                       if isinstance(labels, dict) else labels
                       for labels in exclude]
        return {**values, "axes": axes, "exclude": exclude}

    @model_validator(mode="after")
    def _is_a_grid(self) -> Experiment:
        if twice := [seed for seed in self.seeds if self.seeds.count(seed) > 1]:
            raise ValueError(f"seeds has {twice[0]} twice, which is one run; leave one out")
        if both := self.tune.keys() & self.axes.keys():
            raise ValueError(f"{min(both)} is an axis and to be tuned; leave out one of the two")
        return self

    @model_validator(mode="after")
    def _exclude_names_labels(self) -> Experiment:
        for labels in self.exclude:
            if not labels:
                raise ValueError("exclude has an entry without labels, which all cells have; name "
                                 "labels there, or leave it out")
            for axis, label in labels.items():
                if label not in self.axes.get(axis, {}):
                    raise ValueError(f"exclude names {axis}={label}, and there is no such label; "
                                     "see axes")
        return self

    @model_validator(mode="after")
    def _plot_names_axes(self) -> Experiment:
        unknown = {self.plot.x, self.plot.lines, *self.plot.panels} - {None, *self.axes}
        if unknown:
            raise ValueError(f"plot names {', '.join(sorted(map(str, unknown)))}, and the axes are "
                             f"{', '.join(self.axes)}; take one of them")
        return self


@dataclass(frozen=True)
class Cell:
    """One combination of labels.

    Attributes:
        labels: axis -> label.
        trials: seed -> run.
        recipes: seed -> recipe of the run.
    """

    labels: dict[str, str]
    trials: dict[int, Trial]
    recipes: dict[int, Recipe]


def load_experiment(path: Path) -> Experiment:
    """Reads the file of an experiment.

    Raises:
        ValueError: naming the keys that are wrong.
    """
    return read_yaml(path, Experiment, remedy="see configs/experiments")


def cells(experiment: Experiment, path: Path, words: list[str]) -> list[Cell]:
    """Every combination with its runs, whose recipes are checked.

    Args:
        path: file of the experiment.
        words: overrides for every run.

    Raises:
        ValueError: the recipe of a run is not valid.
    """
    recipe = path.parent / experiment.recipe
    return [make_cell(trial, experiment.seeds, recipe, words) for trial in trials(experiment)]


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


def make_cell(trial: Trial, seeds: list[int], recipe: Path, words: list[str]) -> Cell:
    """A combination with its runs.

    Args:
        recipe: file that every run starts from.

    Raises:
        ValueError: see `cells`; or an override is of a key that the run has a value for.
    """
    seeded = {seed: _seeded(trial, seed, recipe, words) for seed in seeds}
    return Cell(trial.labels, seeded, {seed: load_recipe(recipe, [*words, *t.words])
                                       for seed, t in seeded.items()})


def _seeded(trial: Trial, seed: int, recipe: Path, words: list[str]) -> Trial:
    """A run of the combination with a seed, and with the tokens that its budget gives."""
    seeds = {"seed": seed, "sparsity.seed": seed}
    if both := trial.values.keys() & seeds.keys():
        raise ValueError(f"{min(both)} is given by seeds, and {trial.labels} would give another; "
                         "leave it out of the axes")
    values = {**trial.values, **seeds}
    budget = values.pop(BUDGET, "tokens")
    if budget not in ("tokens", "flops"):
        raise ValueError(f"{BUDGET}={budget} must be tokens or flops")
    if both := {word.partition("=")[0] for word in words} & {*values, "output"}:
        raise ValueError(f"{min(both)}: every run of the grid has a value of its own; change the "
                         "grid's file, or leave this word out")
    trial = replace(trial, values=values, output=trial.output / f"seed={seed}")
    if budget == "tokens":
        return trial
    run = load_recipe(recipe, [*words, *trial.words])
    dense = training_flops(run.model, run.train.sequence_length).total
    tokens = round(run.steps * dense / mean_flops(stages_of(run)).total) * run.tokens_per_step
    return replace(trial, values={**values, "train.tokens": tokens})


def loss_of(trial: Trial, recipe: Recipe) -> float | None:
    """Validation loss at the end of a run, None if the run or the loss is not finite.

    Raises:
        ValueError: the directory holds another recipe's run.
    """
    if not (trial.output / LOG).is_file():
        return None
    try:
        run = read_run(trial.output)
    except ValueError:  # not a step yet
        return None
    changes = changes_of_run(run.recipe, recipe)
    if changes:
        raise ValueError(f"{trial.output} holds another recipe's run: {'; '.join(changes)}. Choose "
                         "another output, or remove it")
    ended = [r for r in run.valid if r["step"] == run.recipe.steps]
    return ended[-1]["loss"] if ended else None


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
    losses = {seed: loss for seed, trial in cell.trials.items()
              if (loss := loss_of(trial, cell.recipes[seed])) is not None}
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


def render(experiment: Experiment, rows: list[dict[str, Any]]) -> str:
    """Markdown table of the rows."""
    columns = [*(Column(axis, lambda row, axis=axis: row["labels"][axis])
                 for axis in [*experiment.axes, *experiment.tune]),
               Column("tokens", form=","), Column("FLOPs", "flops", ".4g"),
               Column("validation loss", _render_loss, align="right"),
               Column("seeds", _render_seeds, align="right")]
    return (f"{Table(columns, rows).markdown()}\n\nNats per token at the end of the run; mean and "
            "95% confidence interval over seeds.\n")


def _render_loss(row: dict[str, Any]) -> str | None:
    if row["mean"] is None:
        return None
    interval = "" if row["interval"] is None else f" ± {row['interval']:.4f}"
    return f"{row['mean']:.4f}{interval}"


def _render_seeds(row: dict[str, Any]) -> str:
    done, missing = len(row["losses"]), row["missing"]
    return f"{done} of {done + missing}" if missing else str(done)
