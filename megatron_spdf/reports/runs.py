"""Runs as a report shows them: pre-training and fine-tuning alike, by what their directories hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_spdf.planning.runs import RECIPE, of_kind, read_logged

SCORES = "scores.json"


@dataclass(frozen=True)
class Logged:
    """A run's directory, read.

    Attributes:
        label: its name, with as much of its path as tells it from the others.
        values: of its recipe.
        scores: task metric -> value, from its scores.json.
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
        return self.values.get("checkpoint") if isinstance(self.values.get("checkpoint"), str) else None

    @property
    def sparsity(self) -> float:
        """As measured at the last record."""
        return self.train[-1]["sparsity"]

    @property
    def planned_steps(self) -> int | None:
        """Of a pre-training run; a fine-tuning recipe counts in epochs."""
        train = self.values.get("train", {})
        if self.fine_tunes or not all(k in train for k in ("tokens", "global_batch", "sequence_length")):
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
        """Time of training up to each record: every step since the last one taken to be as long as the recorded."""
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
    return [_read(directory, label) for directory, label in zip(resolved, _labels(resolved), strict=True)]


def _read(directory: Path, label: str) -> Logged:
    values, records = read_logged(directory)
    return Logged(directory, label, values, of_kind(records, "train"), of_kind(records, "valid"),
                  next(iter(of_kind(records, "bytes")), {}), _scores(directory / SCORES))


def _labels(directories: list[Path]) -> list[str]:
    """The shortest endings of the paths that differ."""
    for parts in range(1, max(len(d.parts) for d in directories) + 1):
        labels = ["/".join(d.parts[-parts:]) for d in directories]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError(directories)


def _scores(file: Path) -> dict[str, float]:
    """The numbers of a scores.json, whether at its top or under `scores`.

    Raises:
        ValueError: it is not JSON.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; write it anew with tools/evaluate.py") from None
    found = found.get("scores", found) if isinstance(found, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
