"""A grid of pre-training runs: every combination of its axes, with every seed, and what came out.

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

`budget: flops` among the values stretches a cell's run until it has cost what the dense model's
costs for the recipe's `train.tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from scipy.stats import t as student

from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.grid import Trial, as_text, axis_of, combinations
from megatron_spdf.runs.measured import LOG, read_run
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.schedule.stages import mean_flops, stages_of
from megatron_spdf.section import Section

BUDGET = "budget"  # the one key among an axis's values that is not of the recipe


class Plot(Section):
    """What the picture shows; axes that it does not name are drawn as further lines."""

    x: str = Field(description="axis along which the loss is drawn")
    lines: str | None = Field(None, description="axis with a line for each of its labels")
    panels: list[str] = Field([], description="axes with a picture for each combination of labels")


class Experiment(Section):
    """One file of configs/experiments."""

    recipe: str = Field(description="pre-training recipe that every run starts from, relative to "
                                    "this file")
    output: str = Field(description="directory of the runs and of the results")
    seeds: list[int] = Field(min_length=1, description="each cell is run with every one of them")
    axes: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1,
                                                       description="name -> label -> key -> value")
    exclude: list[dict[str, str]] = Field(
        [], description="axis -> label; what has them all is left out"
    )
    plot: Plot

    @model_validator(mode="before")
    @classmethod
    def _short_axes(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("axes"), dict):
            return values
        axes = {name: axis_of(name, axis) if isinstance(axis, list)
                else {str(label): v for label, v in axis.items()} if isinstance(axis, dict)
                else axis
                for name, axis in values["axes"].items()}
        exclude = values.get("exclude", [])
        if isinstance(exclude, list):
            exclude = [{axis: as_text(label) for axis, label in labels.items()}
                       if isinstance(labels, dict) else labels
                       for labels in exclude]
        return {**values, "axes": axes, "exclude": exclude}

    @model_validator(mode="after")
    def _exclude_names_labels(self) -> Experiment:
        for labels in self.exclude:
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
    """One combination.

    Attributes:
        labels: axis -> label.
        trials: seed -> its run.
        recipes: seed -> its recipe.
    """

    labels: dict[str, str]
    trials: dict[int, Trial]
    recipes: dict[int, Recipe]


def load_experiment(path: Path) -> Experiment:
    """Reads a file of configs/experiments.

    Raises:
        ValueError: it is none; naming the keys at fault.
    """
    try:
        return Experiment.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        said = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"experiment {path}: {'; '.join(said)}; see configs/experiments") from None


def cells(experiment: Experiment, path: Path, words: list[str]) -> list[Cell]:
    """Every combination with its runs, each of which has been checked as a recipe.

    Args:
        path: of the experiment.
        words: `section.key=value`, for every run.

    Raises:
        ValueError: a combination is no valid recipe.
    """
    recipe, found = path.parent / experiment.recipe, []
    for trial in combinations(experiment.axes, experiment.output):
        if any(left_out.items() <= trial.labels.items() for left_out in experiment.exclude):
            continue
        seeded = {seed: _seeded(trial, seed, recipe, words) for seed in experiment.seeds}
        found.append(Cell(trial.labels, seeded, {seed: load_recipe(recipe, [*words, *t.words])
                                                 for seed, t in seeded.items()}))
    return found


def _seeded(trial: Trial, seed: int, recipe: Path, words: list[str]) -> Trial:
    """The run of a cell with a seed, and with as many tokens as its budget gives it."""
    values = {**trial.values, "seed": seed, "sparsity.seed": seed}
    budget = values.pop(BUDGET, "tokens")
    if budget not in ("tokens", "flops"):
        raise ValueError(f"{BUDGET}={budget} must be tokens or flops")
    trial = replace(trial, values=values, output=trial.output / f"seed={seed}")
    if budget == "tokens":
        return trial
    run = load_recipe(recipe, [*words, *trial.words])
    dense = training_flops(run.model, run.train.sequence_length).total
    tokens = round(run.steps * dense / mean_flops(stages_of(run)).total) * run.tokens_per_step
    return replace(trial, values={**values, "train.tokens": tokens})


def loss_of(trial: Trial, recipe: Recipe) -> float | None:
    """The validation loss at the end of a run; None if it has not come there.

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
    return ended[-1]["loss"] if ended and math.isfinite(ended[-1]["loss"]) else None


def results(grid: list[Cell]) -> list[dict[str, Any]]:
    """A row for every cell, as plain values: labels, tokens, FLOPs, loss of each seed, mean, and
    half the width of the 95% confidence interval of the mean (Student's t over seeds; None for
    fewer than two)."""
    rows = []
    for cell in grid:
        losses = {seed: loss for seed, trial in cell.trials.items()
                  if (loss := loss_of(trial, cell.recipes[seed])) is not None}
        stages = stages_of(next(iter(cell.recipes.values())))  # seeds change nothing in them
        tokens = sum(stage.tokens for stage in stages)
        center, interval = summary(list(losses.values()))
        rows.append({"labels": cell.labels, "tokens": tokens,
                     "flops": mean_flops(stages).total * tokens, "losses": losses,
                     "missing": len(cell.trials) - len(losses), "mean": center,
                     "interval": interval})
    return rows


def summary(losses: list[float]) -> tuple[float | None, float | None]:
    """Mean, and half the width of its 95% confidence interval."""
    if not losses:
        return None, None
    if len(losses) == 1:
        return losses[0], None
    return mean(losses), float(student.ppf(0.975, len(losses) - 1)) * stdev(losses) / math.sqrt(
        len(losses)
    )


def render(experiment: Experiment, rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = [*experiment.axes, "tokens", "FLOPs", "validation loss", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        loss = "-" if row["mean"] is None else f"{row['mean']:.4f}"
        loss += "" if row["interval"] is None else f" ± {row['interval']:.4f}"
        seeds = f"{len(row['losses'])}" + (f" of {len(row['losses']) + row['missing']}"
                                           if row["missing"] else "")
        cols = [*row["labels"].values(), f"{row['tokens']:,}", f"{row['flops']:.4g}", loss, seeds]
        lines.append(f"| {' | '.join(cols)} |")
    return (
        "\n".join(lines)
        + "\n\nNats per token at the end of the run; mean and 95% confidence interval over seeds.\n"
    )
