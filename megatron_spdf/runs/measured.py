"""Reader of what runs have logged: recipe.yaml and log.jsonl of a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from megatron_spdf.files import require_own
from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.recipe.recorded import as_recorded
from megatron_spdf.records.json_reader import json_lines, read_json
from megatron_spdf.records.values import typed
from megatron_spdf.records.yaml_reader import read_yaml
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.text import counted

RECIPE, LOG, MICRO_BATCHES = "recipe.yaml", "log.jsonl", "micro_batch.json"
DAMAGED = "the log is damaged, take it out of the comparison or mend that line"
Whole = Annotated[int, Field(ge=0)]
Figure = Annotated[float, Field(ge=0.0)]
Versions = tuple[tuple[int, int, int] | None, ...]  # inode, size, time of change in nanoseconds


class Record(TypedDict):
    """Line of log.jsonl."""

    kind: str
    step: Whole


class Evaluated(Record):
    """Evaluation, in nats per token; None: the loss is not finite."""

    loss: Figure | None
    standard_error: NotRequired[Figure]


class Step(Evaluated):
    """Training step."""

    tokens: Whole
    step_seconds: NotRequired[Figure]


class Seen(TypedDict):
    """What a move of masks changed, as shares of the active entries; mean age in moves."""

    share: Figure
    overlap: NotRequired[Figure]
    age: NotRequired[Figure]


class Move(Record, Seen):
    """Move of the masks, in all and by the number of the layer: how many entries, and how long it
    took."""

    algorithm: str
    moved: NotRequired[Whole]
    seconds: NotRequired[Figure]
    layers: NotRequired[dict[str, Seen]]


class Bytes(Record):
    """Bytes that rank 0 holds and sends in a step."""

    parameters: NotRequired[Whole]
    gradients: NotRequired[Whole]
    optimizer: NotRequired[Whole]
    sent_per_step: NotRequired[Whole]
    choices: NotRequired[str]


class Settings(TypedDict, total=False):
    """Sections of a recipe, of pre-training or fine-tuning."""

    train: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    log: dict[str, Any]


class Choice(TypedDict):
    """Entry of micro_batch.json: a micro-batch, and the layout that it was chosen for."""

    of: NotRequired[dict[str, Any]]
    micro_batch: Annotated[int, Field(gt=0)]


class NotBegun(ValueError):
    """A run has no record of a training step yet."""


@dataclass(frozen=True)
class MeasuredRun:
    """A pre-training run, finished or not.

    Attributes:
        train, valid: records of their kind, by step.
        bytes: record of the bytes that rank 0 held and sent at the first step; empty: none.
        notes: sentences on figures that are not finite.
    """

    directory: Path
    recipe: Recipe
    train: list[Step]
    valid: list[Evaluated]
    bytes: Bytes
    notes: list[str]

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
    values, records, notes = read_logged(directory)
    recipe = typed(as_recorded(values), Recipe, f"{directory / RECIPE} cannot be read as a "
                   "pre-training recipe")
    recipe = _with_micro_batch(recipe, directory)
    return MeasuredRun(directory, recipe, of_kind(records, "train"), of_kind(records, "valid"),
                       next(iter(of_kind(records, "bytes")), {}), notes)


def versions_of(directory: Path) -> Versions:
    """What tells of each file that `read_run` reads whether it has changed; None: not there."""
    def version(file: Path) -> tuple[int, int, int] | None:
        found = file.stat() if file.is_file() else None
        return found and (found.st_ino, found.st_size, found.st_mtime_ns)

    return tuple(version(directory / name) for name in (RECIPE, LOG, MICRO_BATCHES))


def _with_micro_batch(recipe: Recipe, directory: Path) -> Recipe:
    """Replaces a micro-batch `auto` by the one that the run chose last."""
    if recipe.train.micro_batch != AUTO:
        return recipe
    file = directory / MICRO_BATCHES
    if not file.is_file():
        raise ValueError(f"{directory} has train.micro_batch={AUTO} and no {file.name}; let the "
                         "run go on to its first record")
    chosen = read_json(file, Annotated[list[Choice], Field(min_length=1)], constants=True)
    return recipe.with_micro_batch(chosen[-1]["micro_batch"])


def read_logged(directory: Path,
                step: type[Step] = Step) -> tuple[Settings, list[Record], list[str]]:
    """Values of the recipe, of pre-training or fine-tuning, and records of the log of a run.

    Args:
        step: kind of the records of training steps.

    Returns:
        Values, records, and a sentence on losses that are not finite, if there are any.

    Raises:
        NotBegun: there is no training step in its log yet.
        ValueError: no run there, or files that are damaged or lie elsewhere.
    """
    recipe, log = directory / RECIPE, directory / LOG
    if not recipe.is_file():
        raise ValueError(f"{directory} is no run: it has no {recipe.name}; name the directory "
                         "that `output` of a recipe names")
    if not log.is_file():
        raise NotBegun(f"{directory} is no run yet: it has no {log.name}; let it go on to its "
                       "first record, or name the directory that `output` of a recipe names")
    for file in (recipe, log):
        require_own(directory, file)
    values = read_yaml(recipe, Settings, remedy="was it overwritten?")
    kinds = {"train": step, "valid": Evaluated, "bytes": Bytes, "mask": Move}
    records = [typed(record, kinds.get(record["kind"], Record), place, DAMAGED) for place, record
               in json_lines(log, Record, constants=True, remedy=DAMAGED, cut_short=True)]
    if not of_kind(records, "train"):
        raise NotBegun(f"{log} holds no training step yet; let the run go on to its first record "
                       f"(log.every={values.get('log', {}).get('every', '?')} steps)")
    return values, records, _not_finite(records, log)


def of_kind(records: list[Record], kind: str) -> list[Any]:
    """Records of one kind, in order."""
    return [r for r in records if r["kind"] == kind]


def finite_losses(records: list[Evaluated]) -> list[Evaluated]:
    """Records whose loss is finite."""
    return [r for r in records if r["loss"] is not None]


def _not_finite(records: list[Record], log: Path) -> list[str]:
    lost = {kind: [r["step"] for r in of_kind(records, kind) if r["loss"] is None]
            for kind in ("train", "valid")}
    return [f"{log}: {counted(len(steps), f'{kind} record')} without a finite loss "
            f"{'are' if len(steps) != 1 else 'is'} left out, the first at step {steps[0]:,}"
            for kind, steps in lost.items() if steps]
