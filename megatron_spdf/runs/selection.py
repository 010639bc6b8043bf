"""Sweeps: the fine-tuning runs of a recipe's `sweep:`, and the choice by validation loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.run_metadata import RunState, read_run_record
from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.runs.grid import Trial, axis_of, combinations
from megatron_spdf.tables import Column, Table


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
    axes = {key: axis_of(key, values) for key, values in finetune.sweep.items()}
    return list(combinations(axes, finetune.output))


def result_of(trial: Trial) -> dict[str, Any]:
    """Result of a run, read from its newest checkpoint. A run without one has not begun.

    Returns:
        Plain values: `output`, `values`; `done`, whether its last step is done or it was stopped
        early; `validation_loss` and `step` of its best evaluation, None without one.
    """
    row = {"output": str(trial.output), "values": trial.values, "done": False,
           "validation_loss": None, "step": None}
    if found := store.visible(trial.output / "checkpoints"):
        run = read_run_record(found[-1] / store.RUN)
        state, recipe = RunState(**run["state"]), Recipe.model_validate(run["recipe"])
        stopped = 0 < recipe.evaluate.patience <= state.worse
        row |= {"done": stopped or state.step == recipe.steps,
                "validation_loss": state.best_loss, "step": state.best_step or None}
    return row


def select(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Selects the finished run with the lowest validation loss."""
    finished = [row for row in rows if row["done"] and row["validation_loss"] is not None]
    return {"selected": min(finished, key=lambda row: row["validation_loss"], default=None),
            "unfinished": sum(not row["done"] for row in rows), "runs": rows}


def render(selection: dict[str, Any]) -> str:
    """Table of the selection, the best first."""
    ranked = sorted(selection["runs"],
                    key=lambda row: (not row["done"], row["validation_loss"] or float("inf")))
    columns = [Column("validation loss", "validation_loss", ".4f"), Column("step", form="d"),
               Column("run", lambda row: Path(row["output"]).name),
               Column("", lambda row: "" if row["done"] else "unfinished")]
    return Table(columns, ranked).text()
