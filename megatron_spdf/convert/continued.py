"""The recipe of a run that goes on from a model of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_spdf.convert.huggingface_import import CONFIG, HuggingFaceReader
from megatron_spdf.recipe.load import make_recipe, recipe_values
from megatron_spdf.recipe.recipe import Recipe

# Where nobody gives a recipe: a short warm-up to a low rate, since the weights are trained.
CONTINUED: dict[str, Any] = {
    "train": {"tokens": 1_000_000_000, "global_batch": 64, "micro_batch": 1},
    "optimizer": {"lr": 2e-5, "warmup_tokens": 10_000_000},
}


def recipe_for(source: HuggingFaceReader, path: str | Path | None, words: list[str]) -> Recipe:
    """The recipe of a file, or of continued training, with the source's model where it says
    nothing of it.

    Args:
        path: of the recipe; None: CONTINUED in the precision of the source's files.
        words: overrides.

    Raises:
        ValueError: naming each wrong key or value.
    """
    if path is None:
        precision = "bf16" if source.dtypes == {torch.bfloat16} else "fp32"
        values = {**CONTINUED, "train": {**CONTINUED["train"], "precision": precision}}
    else:
        values = recipe_values(path)
    values = {**values, "model": _completed(values.get("model", {}), source)}
    return make_recipe(values, words, path or source.path / CONFIG)


def _completed(given: Any, source: HuggingFaceReader) -> Any:
    """A model's section with what it leaves out, if it is of the source's family."""
    model = source.model
    if not isinstance(given, dict) or given.get("architecture", model.name) != model.name:
        return given  # whose rules and comparison say what is wrong
    preset = given.get("preset")
    known = model.PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return {**model.model_dump(), **known, **given}
