"""Reader of what runs have logged: recipe.yaml and log.jsonl of a run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.sparsity.plan import Plan

RECIPE, LOG, MICRO_BATCHES = "recipe.yaml", "log.jsonl", "micro_batch.json"


@dataclass(frozen=True)
class MeasuredRun:
    """A pre-training run, finished or not.

    Attributes:
        train, valid: records of their kind, by step.
        bytes: record of the bytes that rank 0 held and sent at the first step; empty: none.
    """

    directory: Path
    recipe: Recipe
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    bytes: dict[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def plan(self) -> Plan:
        return Plan.of(self.recipe)

    @property
    def finished(self) -> bool:
        return bool(self.train) and self.train[-1]["step"] >= self.recipe.steps


def read_run(directory: str | Path) -> MeasuredRun:
    """Reads the directory of a pre-training run, without a last line that is still being written.

    Raises:
        ValueError: no run there, or no training step in its log.
    """
    directory = Path(directory)
    values, records = read_logged(directory)
    try:
        recipe = _with_micro_batch(Recipe.model_validate(values), directory)
    except (ValueError, OSError) as error:
        raise ValueError(f"{directory / RECIPE} cannot be read as a pre-training "
                         f"recipe: {error}") from None
    return MeasuredRun(directory, recipe, of_kind(records, "train"), of_kind(records, "valid"),
               next(iter(of_kind(records, "bytes")), {}))


def _with_micro_batch(recipe: Recipe, directory: Path) -> Recipe:
    """Replaces a micro-batch `auto` by the one that the run chose last."""
    if recipe.train.micro_batch != AUTO:
        return recipe
    chosen = json.loads((directory / MICRO_BATCHES).read_text())
    return recipe.with_micro_batch(chosen[-1]["micro_batch"])


def read_logged(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Values of the recipe, of pre-training or fine-tuning, and records of the log of a run.

    Raises:
        ValueError: no run there, or no training step in its log.
    """
    recipe, log = directory / RECIPE, directory / LOG
    for file in (recipe, log):
        if not file.is_file():
            raise ValueError(f"{directory} is no run: it has no {file.name}; name the directory "
                             "that `output` of a recipe names")
    try:
        values = yaml.safe_load(recipe.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{recipe} is no recipe but a {type(values).__name__}; was it "
                         "overwritten?")
    records = _records(log)
    if not of_kind(records, "train"):
        raise ValueError(f"{log} holds no training step yet; let the run go on to its first record "
                         f"(log.every={values.get('log', {}).get('every', '?')} steps)")
    return values, records


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Records of one kind, in order."""
    return [r for r in records if r.get("kind") == kind]


def _records(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{log}, line {number}: not JSON: {line[:60]!r}; the log is "
                                 "damaged, take it out of the comparison or mend that "
                                 "line") from None
    return records
