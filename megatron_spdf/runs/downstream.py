"""Fine-tuning of the runs of a grid, and the scores of what comes of it, in the grid's file:

    finetune:
      recipe: ../finetune/e2e_tiny.yaml      # relative to this file
      axes:                                  # as those of the grid, keys are of that recipe
        fine_tuning: {dense: {mode: dense}, sparse: {mode: sparse}}
      exclude:                               # labels of both are known here
        - {masks: dense, fine_tuning: sparse}
      decoding: {beams: 4, max_new_tokens: 128}
      order:                                 # differences of neighbors are shown, the best first
        - {masks: dense, fine_tuning: dense}
        - {masks: 75%, fine_tuning: dense}

Every finished run of the grid is fine-tuned by finetune.py with each combination of these labels,
with its own seed, and tools/evaluate.py scores the best checkpoint on the test split.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_spdf.data.finetuning.task import TASKS, count_pairs
from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.finetune import Finetune, load_finetune, training_recipe
from megatron_spdf.recipe.load import write_value
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.grid import (
    Trial,
    combinations,
    command,
    directory_name,
    labeled_axes,
    require_labels,
)
from megatron_spdf.runs.measured import LOG, RECIPE, NotBegun, read_run
from megatron_spdf.runs.selection import result_of
from megatron_spdf.section import PathText, Section
from megatron_spdf.sparsity.plan import Plan

ROOT = Path(__file__).resolve().parents[2]


class Decoding(Section):
    """Options of tools/evaluate.py. What is not given is the task's."""

    split: str = Field("test", pattern="^(train|validation|test)$", description="what is decoded")
    beams: int | None = Field(None, ge=1, description="width of the beam")
    length_penalty: float | None = Field(None, description="power of the length")
    no_repeat_ngram: int | None = Field(None, ge=0, description="tokens; 0: any may be repeated")
    max_new_tokens: int | None = Field(None, ge=1, description="of a completion")
    batch_size: int | None = Field(None, ge=1, description="prompts decoded together")

    @property
    def words(self) -> list[str]:
        """As options of the command."""
        given = self.model_dump(exclude_none=True)
        return [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]


class Downstream(Section):
    """Fine-tuning of every run of a grid."""

    recipe: PathText = Field(description="fine-tuning recipe that every run starts from, relative "
                                         "to this file")
    axes: dict[str, dict[str, dict[str, Any]]] = Field(min_length=1,
                                                       description="name -> label -> key -> value")
    exclude: list[dict[str, str]] = Field([], description="axis -> label, of the grid's too; what "
                                                          "has them all is left out")
    decoding: Decoding = Field(Decoding(), description="of the test split")
    order: list[dict[str, str]] = Field([], description="axis -> label, of the grid's too; each is "
                                                        "compared, seed by seed, with the next")

    @model_validator(mode="before")
    @classmethod
    def _short_axes(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("axes"), dict):
            return values
        naming = {key: [_as_text(labels) for labels in values[key]]
                  for key in ("exclude", "order") if isinstance(values.get(key), list)}
        return {**values, "axes": labeled_axes(values["axes"]), **naming}

    def check_labels(self, axes: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises a ValueError where a label is of no axis, here or in the grid.

        Args:
            axes: of the grid.
        """
        if both := self.axes.keys() & axes.keys():
            raise ValueError(f"finetune.axes has {min(both)}, which is an axis of the grid; give "
                             "it another name")
        known = {**axes, **self.axes}
        for key in ("exclude", "order"):
            for labels in getattr(self, key):
                require_labels(f"finetune.{key}", labels, known)


def _as_text(labels: Any) -> Any:
    """Labels as `axis_of` writes them: `{sparsity: 0.75}` names the label "0.75"."""
    return {axis: label if isinstance(label, str) else write_value(label)
            for axis, label in labels.items()} if isinstance(labels, dict) else labels


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning run of a grid.

    Attributes:
        labels: axis -> label, of the grid and of the fine-tuning.
        start: directory of the pre-training run.
        trial: its directory, and values of keys of the fine-tuning recipe.
        recipe: of the run.
        decoding: of the evaluation.
    """

    labels: dict[str, str]
    seed: int
    start: Path
    trial: Trial
    recipe: Finetune
    decoding: Decoding

    @property
    def scores(self) -> Path:
        """Directory of the evaluation."""
        return (self.trial.output / "evaluation"
                / f"{self.recipe.data.task}_{self.decoding.split}")

    @property
    def done(self) -> bool:
        """True if the run is at its end.

        Raises:
            ValueError: the directory holds another recipe's run.
        """
        kept = self.trial.output / RECIPE
        if not kept.is_file():
            return False
        if changes := changes_of_run(load_finetune(kept), self.recipe):
            raise ValueError(f"{self.trial.output} holds another recipe's run: "
                             f"{'; '.join(changes)}. Choose another output, or remove it")
        return result_of(self.trial)["done"]

    @property
    def scored(self) -> bool:
        """True if there are scores."""
        return (self.scores / "scores.json").is_file()

    def check(self, start: Recipe) -> None:
        """Raises what finetune.py and tools/evaluate.py would say of the data, and of the recipe,
        once the pre-training is over.

        Args:
            start: recipe of the pre-training run.

        Raises:
            ValueError, FileNotFoundError: naming the value, the rule and the remedy.
        """
        data = self.recipe.data
        pairs = count_pairs(data.task, data.path, self.decoding.split)
        if self.recipe.mode == "sparse" and not Plan.of(start).weights:
            raise ValueError(f"mode=sparse keeps the mask of the start, and {self.start} has none; "
                             "name these labels in finetune.exclude, or set mode=dense")
        recipe = training_recipe(self.recipe, start.model, start.sparsity.held(), pairs)
        if not self._start_is_over:  # else finetune.py says it at once
            self._check_tokens(recipe, start)
        from megatron_spdf.evaluation.decoding import (  # imports PyTorch and transformers
            DecodingSettings,
            room_for_prompts,
        )

        given = self.decoding.model_dump(exclude_none=True, exclude={"split"})
        settings = DecodingSettings(**{**TASKS.get(data.task).decoding, **given})
        room_for_prompts(start.model.max_positions, settings)

    def _check_tokens(self, recipe: Recipe, start: Recipe) -> None:
        """Raises a ValueError where a completion does not fit the window, or the teacher cannot be
        read or has another tokenizer than the data of the pre-training run."""
        from megatron_spdf.convert.teacher import open_teacher  # imports PyTorch
        from megatron_spdf.data.finetuning.completions import require_fit
        from megatron_spdf.data.pretraining.corpus import data_tokenizer

        data, tokenizer = self.recipe.data, data_tokenizer(start)
        for split in ("train", "validation"):
            require_fit(data.task, Path(data.path), split, tokenizer, recipe.train.sequence_length,
                        data.too_long)
        if recipe.distill.on:
            open_teacher(recipe, tokenizer)
            _require_sound(recipe.distill.teacher)

    @property
    def _start_is_over(self) -> bool:
        """True if the pre-training run is at its end."""
        try:
            return (self.start / LOG).is_file() and read_run(self.start).finished
        except NotBegun:
            return False

    def may_begin(self) -> bool:
        """True if the pre-training run is at its end; says so where it is not."""
        if self._start_is_over:
            return True
        print(f"{self.trial.output} is not begun, as {self.start} is not at its end", flush=True)
        return False

    def may_be_scored(self) -> bool:
        """True if the run is at its end; says so where it is not."""
        if self.done:
            return True
        print(f"{self.trial.output} is not scored, as it is not at its end", flush=True)
        return False

    def commands(self, recipe: Path, launch: str) -> dict[Path, list[str]]:
        """What is left to do: run directory, or that of the evaluation -> command line.

        Args:
            recipe: file of the fine-tuning recipe.
            launch: see `grid.command`.
        """
        tune = command(launch, "finetune.py", recipe, [], self.trial)
        score = [*shlex.split(launch or sys.executable), str(ROOT / "tools/evaluate.py"),
                 str(self.trial.output), f"--task={self.recipe.data.task}", *self.decoding.words]
        return {**({} if self.done else {self.trial.output: tune}),
                **({} if self.scored else {self.scores: score})}


@functools.cache
def _require_sound(path: str) -> None:
    """Reads every weight of a teacher, once for all runs."""
    from megatron_spdf.convert.source import open_weights, require_sound

    require_sound(open_weights(path, checksums=False))


def tunings(downstream: Downstream, labels: Mapping[str, str], runs: Mapping[int, Path],
            directory: Path) -> Iterator[Tuned]:
    """Fine-tuning runs of a cell of a grid, those of a seed together.

    Args:
        labels: of the cell.
        runs: seed -> pre-training run.
        directory: of the grid's file.

    Raises:
        ValueError: the recipe of a run is not valid.
    """
    combined = [(trial, {**labels, **trial.labels})
                for trial in combinations(downstream.axes, "")]
    kept = [(trial, both) for trial, both in combined
            if not any(left_out.items() <= both.items() for left_out in downstream.exclude)]
    for seed, start in runs.items():
        for trial, both in kept:
            if own := trial.values.keys() & {"seed", "checkpoint", "output"}:
                raise ValueError(f"finetune.axes gives {min(own)} a value, which every run of the "
                                 "grid has of its own; leave it out")
            output = start.parent.parent / "finetune" / directory_name(both) / f"seed={seed}"
            own = replace(trial, output=output, values={**trial.values, "seed": seed,
                                                        "checkpoint": str(start)})
            recipe = load_finetune(directory / downstream.recipe, own.words)
            yield Tuned(both, seed, start, own, recipe, downstream.decoding)
