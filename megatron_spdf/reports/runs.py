"""Runs as a report shows them: pre-training and fine-tuning alike, by what their directories
hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_spdf.runs.measured import RECIPE, of_kind, read_logged

EVALUATIONS = "evaluation/*/scores.json"


@dataclass(frozen=True)
class Logged:
    """A run's directory, read.

    Attributes:
        label: its name, with as much of its path as tells it from the others.
        values: of its recipe.
        scores: metric -> value on all of the test set, from tools/evaluate.py.
    """

    directory: Path
    label: str
    values: dict[str, Any]
    train: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    bytes: dict[str, Any]
    scores: dict[str, float]

    @property
    def recipe(self) -> Path:
        return self.directory / RECIPE

    @property
    def fine_tunes(self) -> str | None:
        """The checkpoint that a fine-tuning run started from; None for pre-training."""
        return self.values.get("checkpoint") if isinstance(self.values.get("checkpoint"),
                                                           str) else None

    @property
    def sparsity(self) -> float:
        """As measured at the last record."""
        return self.train[-1]["sparsity"]

    @property
    def planned_steps(self) -> int | None:
        """Of a pre-training run; a fine-tuning recipe counts in epochs."""
        train = self.values.get("train", {})
        if self.fine_tunes or not all(k in train
                                      for k in ("tokens", "global_batch", "sequence_length")):
            return None
        return max(1, round(train["tokens"] / (train["global_batch"] * train["sequence_length"])))

    @property
    def tokens(self) -> int:
        return self.train[-1]["tokens"]

    @property
    def flops(self) -> float:
        return self.train[-1]["flops"]

    @property
    def validation_loss(self) -> float | None:
        return self.valid[-1]["loss"] if self.valid else None

    @property
    def tokens_per_second(self) -> float:
        return median(r["tokens_per_second"] for r in self.train)

    def hours(self) -> list[float]:
        """Time of training up to each record: every step since the last one taken to be as long as
        the recorded."""
        total, before, found = 0.0, 0, []
        for record in self.train:
            total += record["step_seconds"] * (record["step"] - before)
            before = record["step"]
            found.append(total / 3600)
        return found

    def at_steps(self, figure: str) -> dict[int, float]:
        """A figure of the training records by step; records without it left out."""
        return {r["step"]: r[figure] for r in self.train if r.get(figure) is not None}


def read_all(directories: list[Path]) -> list[Logged]:
    """Reads the runs, in the order given.

    Raises:
        ValueError: a directory that is no run, or the same one twice.
    """
    resolved = [d.resolve() for d in directories]
    twice = sorted({str(d) for d in resolved if resolved.count(d) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named more than once; name each run once")
    return [_read(directory, label) for directory,
            label in zip(resolved, _labels(resolved), strict=True)]


def _read(directory: Path, label: str) -> Logged:
    values, records = read_logged(directory)
    return Logged(directory, label, values, of_kind(records, "train"), of_kind(records, "valid"),
                  next(iter(of_kind(records, "bytes")), {}), _scores(directory))


def _labels(directories: list[Path]) -> list[str]:
    """The shortest endings of the paths that differ."""
    for parts in range(1, max(len(d.parts) for d in directories) + 1):
        labels = ["/".join(d.parts[-parts:]) for d in directories]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError(directories)


def _scores(directory: Path) -> dict[str, float]:
    """Metric -> value of a run's evaluation; where it has several, their names are put before the
    metrics'.

    Raises:
        ValueError: an evaluation is not what tools/evaluate.py writes.
    """
    found = {}
    for file in sorted(directory.glob(EVALUATIONS)):
        try:
            found[file.parent.name] = json.loads(file.read_text())["scores"]["all"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no scores ({error!r}); write it anew with "
                             "tools/evaluate.py") from None
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{name} {metric}": value for name, scores in found.items() for metric,
            value in scores.items()}
