"""Content of run.json: progress, recipe, tokenizer, masks and origin of a run."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any, Literal, TypedDict

from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.version import __version__


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


INITIAL = "initial values"  # the origin of most runs


def seeded_masks(plan: Plan) -> Masks:
    """Masks that the plan draws."""
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
    times = f", moved {masks['updates']:,} times by {masks['algorithm']}"
    return masks["how"] + (times if masks["kind"] == "moved" else "")


def run_record(recipe: Recipe, plan: Plan, tokenizer: Tokenizer, masks: Masks, origin: str,
               state: dict[str, int | float | None],
               measured_sparsity: dict[str, float]) -> dict[str, Any]:
    """Content of run.json.

    Args:
        recipe, plan, tokenizer, masks: of the run.
        origin: of the weights at step 0, in words.
        state: progress of the run, the fields of `checkpointer.RunState`.
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
