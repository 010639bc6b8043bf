"""What runs have logged, read back: recipe.yaml and log.jsonl of a run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_spdf.config import Recipe
from megatron_spdf.model.weights import model_weights
from megatron_spdf.sparsity.plan import Plan, make_plan


@dataclass(frozen=True)
class Run:
    """A pre-training run's directory as it stands, finished or not.

    Attributes:
        train, valid: records of their kind, by step.
        bytes: what rank 0 held and sent at the first step; empty if it was not logged.
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
        return make_plan(self.recipe.sparsity, model_weights(self.recipe.model), self.recipe.model.query_groups)

    @property
    def finished(self) -> bool:
        return bool(self.train) and self.train[-1]["step"] >= self.recipe.steps


def read_run(directory: str | Path) -> Run:
    """Reads a run directory; a last line that is still being written is left out.

    Raises:
        ValueError: no run there, or no training step in its log.
    """
    directory = Path(directory)
    recipe, log = directory / "recipe.yaml", directory / "log.jsonl"
    for file in (recipe, log):
        if not file.is_file():
            raise ValueError(f"{directory} is no run: it has no {file.name}; name the directory that `output` of a "
                             "recipe names")
    try:
        known = Recipe.model_validate(yaml.safe_load(recipe.read_text()))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{recipe} cannot be read as a recipe: {error}") from None
    records = _records(log)
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        raise ValueError(f"{log} holds no training step yet; let the run go on to its first record "
                         f"(log.every={known.log.every} steps)")
    counted = next((r for r in records if r["kind"] == "bytes"), {})
    return Run(directory, known, train, [r for r in records if r["kind"] == "valid"], counted)


def _records(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{log}, line {number}: not JSON: {line[:60]!r}; the log is damaged, take it out of "
                                 "the comparison or mend that line") from None
    return records
