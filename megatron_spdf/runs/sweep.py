"""The runs of a sweep: one for each combination of the listed values, and the choice among them."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_spdf.checkpoint import store
from megatron_spdf.files import write_json
from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.recipe import Recipe

SELECTION = "selection.json"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        values: key of the recipe -> the value tried.
        output: run directory, inside that of the sweep and named after the values.
    """

    values: dict[str, Any]
    output: Path

    @property
    def words(self) -> list[str]:
        """What makes the recipe this run's, as `section.key=value`."""
        return [*as_words(self.values), f"output={self.output}"]


@dataclass(frozen=True)
class Result:
    """Where a trial stands.

    Attributes:
        done: it came to its end, by its steps or by early stopping.
        loss, step: of its best evaluation; None: there was none yet.
    """

    done: bool = False
    loss: float | None = None
    step: int | None = None


def trials(finetune: Finetune) -> list[Trial]:
    """Every combination, the last key of `sweep` varying fastest.

    Raises:
        ValueError: there is nothing to sweep.
    """
    empty = [key for key, values in finetune.sweep.items() if not values]
    if not finetune.sweep or empty:
        raise ValueError("the recipe lists no values to "
                         f"try{' for ' + ', '.join(empty) if empty else ''}; write for example "
                         "sweep: {optimizer.lr: [1e-4, 5e-5]}")
    found = []
    for combination in itertools.product(*finetune.sweep.values()):
        values = dict(zip(finetune.sweep, combination, strict=True))
        name = ",".join(f"{key}={_yaml(value)}" for key, value in values.items()).replace("/", "_")
        found.append(Trial(values, Path(finetune.output) / name))
    return found


def result_of(trial: Trial) -> Result:
    """Reads a trial's newest checkpoint; a trial without one has not begun."""
    found = store.visible(trial.output / "checkpoints")
    if not found:
        return Result()
    run = json.loads((found[-1] / store.RUN).read_text())
    state, recipe = run["state"], Recipe.model_validate(run["recipe"])
    stopped = 0 < recipe.evaluate.patience <= state["worse"]
    return Result(stopped or state["step"] == recipe.steps, state["best_loss"],
                  state["best_step"] or None)


def select(finetune: Finetune) -> dict[str, Any]:
    """The trials with their results, and the finished one with the lowest validation loss; as plain
    values."""
    results = [(trial, result_of(trial)) for trial in trials(finetune)]
    rows = [{"output": str(trial.output), "values": trial.values, "done": result.done,
             "validation_loss": result.loss,
             "step": result.step} for trial, result in results]
    finished = [row for row in rows if row["done"] and row["validation_loss"] is not None]
    return {"selected": min(finished, key=lambda row: row["validation_loss"], default=None),
            "unfinished": sum(not row["done"] for row in rows), "runs": rows}


def write_selection(finetune: Finetune, selection: dict[str, Any]) -> Path:
    """Writes `selection.json` into the directory of the sweep."""
    path = Path(finetune.output) / SELECTION
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, selection)
    return path


def render(selection: dict[str, Any]) -> str:
    """The selection as a table, the best first."""
    ranked = sorted(selection["runs"],
                    key=lambda row: (not row["done"], row["validation_loss"] or float("inf")))
    lines = [f"{'validation loss':>15}{'step':>8}  run"]
    for row in ranked:
        loss = f"{row['validation_loss']:.4f}" if row["validation_loss"] is not None else "-"
        note = "" if row["done"] else "  (unfinished)"
        lines.append(f"{loss:>15}{row['step'] or '-':>8}  {Path(row['output']).name}{note}")
    return "\n".join(lines)


def as_words(values: dict[str, Any]) -> list[str]:
    """Keys of a recipe with their values as `section.key=value`."""
    return [f"{key}={_yaml(value)}" for key, value in values.items()]


def _yaml(value: Any) -> str:
    """A value as it is written in a `section.key=value` word."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
    return text.removesuffix("...").strip().strip("'")
