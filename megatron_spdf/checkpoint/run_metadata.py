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
    """What masks a run has: those that the plan draws, which every start can draw again, or given
    ones, which live in the checkpoints alone. `how` says it in words."""

    kind: Literal["drawn", "given"]
    how: str


INITIAL = "initial values"  # the origin of most runs


def drawn_masks(plan: Plan) -> Masks:
    return {"kind": "drawn", "how": f"random, seed {plan.seed}"}


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
