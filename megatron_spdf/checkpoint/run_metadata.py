"""Content of run.json: progress, recipe, tokenizer, masks and origin of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.files import CHECKPOINT
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.recorded import as_recorded
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.records.values import typed
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.text import counted
from megatron_spdf.version import __version__

Whole = Annotated[int, Field(ge=0)]
REMEDY = ("use a checkpoint that this program wrote, or the version of this program that wrote it")


@dataclass
class RunState:
    """Progress of a run. With the recipe it determines learning rate, data position and random
    numbers.

    Attributes:
        step: batches consumed, skipped ones included.
        optimizer_steps: updates since the optimizer's state was zero, at the start of the run or of
            a stage.
        skipped: steps skipped for non-finite numbers.
        skipped_in_a_row: those since the last step that was not skipped.
        evaluated: step of the last evaluation.
        best_step, best_loss: of the evaluation with the lowest loss; step 0 before there is one.
        worse: evaluations since the best.
        tokens: number that the model has read.
        mask_updates: moves of the masks.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Whole = 0
    optimizer_steps: Whole = 0
    skipped: Whole = 0
    skipped_in_a_row: Whole = 0
    evaluated: Whole = 0
    best_step: Whole = 0
    best_loss: float | None = None
    worse: Whole = 0
    tokens: Whole = 0
    mask_updates: Whole = 0


class Masks(TypedDict):
    """Origin of the masks of a checkpoint.

    Seeded masks can be drawn again at every start. The others exist in the checkpoints alone.

    Attributes:
        kind: "seeded": drawn from the plan's seed; "stored": chosen otherwise before the run;
            "moved": changed since.
        how: origin before any move, in words.
        algorithm: name of the one that moves them, or that moved them last.
        updates: number of moves.
    """

    kind: Literal["seeded", "stored", "moved"]
    how: str
    algorithm: str
    updates: int


class SavedTokenizer(TypedDict):
    """Identity of the tokenizer of a run."""

    kind: str
    sha256: str


class SavedSparsity(TypedDict):
    """Planned and measured fraction of zeros of a weight."""

    target: float
    measured: float


class RunRecord(TypedDict):
    """Content of run.json; `state` has the fields of `RunState`."""

    state: dict[str, Any]
    tokens: Whole
    recipe: dict[str, Any]
    tokenizer: SavedTokenizer
    masks: NotRequired[Masks]
    origin: NotRequired[str]
    sparsity: dict[str, SavedSparsity]
    versions: dict[str, str]
    saved: str


def read_run_record(path: Path) -> RunRecord:
    """Reads run.json.

    Raises:
        ValueError: it cannot be read, does not describe a run, or is of another step than the name
            of the checkpoint says.
        OSError: it cannot be opened.
    """
    run = read_json(path, RunRecord, constants=True, remedy=REMEDY)
    run["recipe"] = as_recorded(run["recipe"])
    typed(run["state"], RunState, f"{path}: state", REMEDY)
    typed(run["recipe"], Recipe, f"{path}: recipe", REMEDY)
    named = CHECKPOINT.fullmatch(path.absolute().parent.name)
    step = run["state"].get("step", RunState.step)
    if named and int(named[1]) != step:
        raise ValueError(f"{path} is of step {step}, and {path.parent.name} is the name of another "
                         f"step's checkpoint; if it was renamed, call it step_{step:08d}")
    return run


INITIAL = "initial values"  # the origin of most runs


def seeded_masks(plan: Plan) -> Masks:
    """Masks of a run whose weights are drawn: those that the plan draws, or that the weights
    choose."""
    if any(w.algorithm.keeps for w in plan.weights.values()):
        return stored_masks("the largest magnitudes in each slice")
    return {"kind": "seeded", "how": f"random, seed {plan.seed}", "algorithm": "static",
            "updates": 0}


def stored_masks(how: str) -> Masks:
    """Masks that were chosen before the run."""
    return {"kind": "stored", "how": how, "algorithm": "static", "updates": 0}


def after_moves(masks: Masks, algorithm: str, updates: int) -> Masks:
    """Masks of a run after `updates` moves."""
    if not updates:
        return {**masks, "algorithm": algorithm} if masks["kind"] != "moved" else masks
    return {**masks, "kind": "moved", "algorithm": algorithm, "updates": updates}


def describe_masks(masks: Masks) -> str:
    """Origin of the masks, in words."""
    times = f", moved {counted(masks['updates'], 'time')} by {masks['algorithm']}"
    return masks["how"] + (times if masks["kind"] == "moved" else "")


def run_record(recipe: Recipe, plan: Plan, tokenizer: Tokenizer, masks: Masks, origin: str,
               state: dict[str, int | float | None],
               measured_sparsity: dict[str, float]) -> RunRecord:
    """Content of run.json.

    Args:
        recipe, plan, tokenizer, masks: of the run.
        origin: of the weights at step 0, in words.
        state: progress of the run, the fields of `RunState`.
        measured_sparsity: canonical name of a sparse weight -> fraction of zeros.
    """
    return {
        "state": state,
        "tokens": state["tokens"],
        "recipe": recipe.model_dump(),
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
        "masks": masks,
        "origin": origin,
        "sparsity": {n: {"target": w.sparsity, "measured": measured_sparsity[n]}
                     for n, w in plan.weights.items()},
        "versions": {"megatron_spdf": __version__, "torch": version("torch"),
                     "megatron-core": version("megatron-core")},
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
