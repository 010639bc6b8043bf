"""Runs of a report, read from their directories: pre-training and fine-tuning alike."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, NotRequired

from typing_extensions import TypedDict

from megatron_spdf.files import require_own
from megatron_spdf.paths import real
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.runs.measured import (
    RECIPE,
    Bytes,
    Evaluated,
    Figure,
    Move,
    NotBegun,
    Settings,
    Step,
    Whole,
    finite_losses,
    of_kind,
    read_logged,
)

EVALUATIONS = "evaluation/*/scores.json"


class ReportedStep(Step):
    """Training step, with what a report shows of it."""

    flops: Figure
    sparsity: Figure
    tokens_per_second: Figure
    step_seconds: Figure
    grad_norm: NotRequired[float | None]
    lr: NotRequired[float | None]
    memory_bytes: NotRequired[Whole]


class Parts(TypedDict):
    """Scores on parts of the test set."""

    all: dict[str, float | None]


class Evaluation(TypedDict):
    """Content of scores.json."""

    scores: Parts


@dataclass(frozen=True)
class Logged:
    """Run directory, read.

    Attributes:
        label: name of the directory, with as much of its path as distinguishes the run, without
            settings such as "lr=0.1" that are in the names of all runs.
        values: of its recipe.
        train: records of training steps.
        valid: records of evaluations with a finite loss.
        bytes: record of memory and traffic.
        scores: metric -> value on all of the test set, from tools/evaluate.py.
        notes: sentences on figures that are not finite.
        moves: records of moves of the masks.
    """

    directory: Path
    label: str
    values: Settings
    train: list[ReportedStep]
    valid: list[Evaluated]
    bytes: Bytes
    scores: dict[str, float | None]
    notes: list[str]
    moves: list[Move] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        """Recipe file of the run."""
        return self.directory / RECIPE

    @property
    def fine_tunes(self) -> str | None:
        """Checkpoint that a fine-tuning run started from. None for pre-training."""
        checkpoint = self.values.get("checkpoint")
        return checkpoint if isinstance(checkpoint, str) else None

    @property
    def seed(self) -> Any:
        """Seed of its recipe. None if it has none."""
        return self.values.get("seed")

    @property
    def training_loss(self) -> float | None:
        """Mean of the last tenth of the records. None if none of these is finite."""
        return mean(found) if (found := [
            r["loss"] for r in self.train[-max(1, len(self.train) // 10):]
            if r["loss"] is not None]) else None

    @property
    def sparsity(self) -> float:
        """Sparsity measured at the last record."""
        return self.train[-1]["sparsity"]

    @property
    def planned_steps(self) -> int | None:
        """Steps of a pre-training run. None for fine-tuning, whose recipe counts epochs."""
        train = self.values.get("train", {})
        counts = [train.get(k) for k in ("tokens", "global_batch", "sequence_length")]
        if self.fine_tunes or not all(isinstance(n, int) and n > 0 for n in counts):
            return None
        tokens, batch, length = counts
        return max(1, round(tokens / (batch * length)))

    @property
    def tokens(self) -> int:
        """Tokens consumed at the last record."""
        return self.train[-1]["tokens"]

    @property
    def flops(self) -> float:
        """Training FLOPs at the last record."""
        return self.train[-1]["flops"]

    @property
    def validation_loss(self) -> float | None:
        """Loss of the last evaluation, in nats per token. None without one."""
        return self.valid[-1]["loss"] if self.valid else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the last evaluation, where it did not blow up."""
        loss = self.validation_loss
        return None if loss is None else math.exp(min(loss, 700.0))

    @property
    def state_bytes(self) -> int | None:
        """Bytes of weights, gradients and optimizer of rank 0."""
        return sum(self.bytes.get(k, 0) for k in ("parameters", "gradients", "optimizer")) or None

    @property
    def peak_bytes(self) -> float | None:
        """Most memory of rank 0 in any record."""
        return max(self.at_steps("memory_bytes").values(), default=None)

    @property
    def tokens_per_second(self) -> float:
        """Median over the records."""
        return median(r["tokens_per_second"] for r in self.train)

    def hours(self) -> list[float]:
        """Training time up to each record. Steps without a record count as long as the next
        recorded one."""
        total, before, found = 0.0, 0, []
        for record in self.train:
            total += record["step_seconds"] * (record["step"] - before)
            before = record["step"]
            found.append(total / 3600)
        return found

    def at_steps(self, figure: str) -> dict[int, float]:
        """Values of one figure of the training records, step -> value. Records without it are left
        out."""
        return {r["step"]: r[figure] for r in self.train if r.get(figure) is not None}


def read_all(directories: list[Path]) -> list[Logged]:
    """Reads runs, in the order given.

    Raises:
        ValueError: a directory is not a run, has no record yet, or is named twice.
    """
    return [_read(directory, label) for directory, label in _labeled(directories)]


def read_begun(directories: list[Path]) -> tuple[list[Logged], list[str]]:
    """As `read_all`, but leaves out runs that have no record yet.

    Returns:
        Runs, and a sentence on each that is left out.

    Raises:
        ValueError: as `read_all` does, or no run has a record.
    """
    runs, notes = [], []
    for directory, label in _labeled(directories):
        try:
            runs.append(_read(directory, label))
        except NotBegun as error:
            if len(directories) == 1:
                raise
            notes.append(f"left out: {error}")
    if not runs:
        raise ValueError("no run has a record of a training step yet; let one go on to its first "
                         f"({notes[0]})")
    return runs, notes


def _labeled(directories: list[Path]) -> list[tuple[Path, str]]:
    """Directories, resolved, and the labels of their runs.

    Raises:
        ValueError: one is named twice.
    """
    resolved = [real(d) for d in directories]
    twice = sorted({str(d) for d in resolved if resolved.count(d) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is named more than once; name each run once")
    return list(zip(resolved, _labels(resolved), strict=True))


def _read(directory: Path, label: str) -> Logged:
    values, records, notes = read_logged(directory, ReportedStep)
    return Logged(directory, label, values, of_kind(records, "train"),
                  finite_losses(of_kind(records, "valid")),
                  next(iter(of_kind(records, "bytes")), {}), _scores(directory), notes,
                  of_kind(records, "mask"))


def _labels(directories: list[Path]) -> list[str]:
    """Shortest endings of the paths that differ from one another, without the settings that all
    have."""
    for parts in range(1, max(len(d.parts) for d in directories) + 1):
        labels = ["/".join(d.parts[-parts:]) for d in directories]
        if len(set(labels)) == len(labels):
            return _without_common(labels)
    raise AssertionError(directories)


def _without_common(labels: list[str]) -> list[str]:
    """Labels without the settings that are in all of them, where each then still says something."""
    settings = [set(re.split("[,/]", label)) for label in labels]
    common = {word for word in set.intersection(*settings) if "=" in word}
    if len(labels) == 1 or not common:
        return labels
    shorter = ["/".join(filter(None, (",".join(word for word in part.split(",")
                                               if word not in common)
                                      for part in label.split("/")))) for label in labels]
    return shorter if all(shorter) and len(set(shorter)) == len(labels) else labels


def _scores(directory: Path) -> dict[str, float | None]:
    """Metric -> value of a run's evaluation. Names of several evaluations precede those of the
    metrics.

    Raises:
        ValueError: an evaluation is not a file of tools/evaluate.py, or lies elsewhere.
    """
    found = {}
    for file in sorted(directory.glob(EVALUATIONS)):
        require_own(directory, file)
        found[file.parent.name] = read_json(
            file, Evaluation, constants=True,
            remedy="write it anew with tools/evaluate.py")["scores"]["all"]
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{name} {metric}": value
            for name, scores in found.items() for metric, value in scores.items()}
