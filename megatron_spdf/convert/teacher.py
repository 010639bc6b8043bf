"""The model that a run distills from, opened and held against the run's data."""

from __future__ import annotations

from megatron_spdf.convert.source import WeightSource, open_weights
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.recipe.distillation import require_teacher
from megatron_spdf.recipe.recipe import Recipe


def open_teacher(recipe: Recipe, tokenizer: Tokenizer) -> WeightSource | None:
    """Opens the teacher of a run.

    Args:
        recipe: of the student's run.
        tokenizer: of its data.

    Returns:
        Its weights; None: the recipe distills from no model.

    Raises:
        ValueError: the teacher is damaged, or has another tokenizer than the data.
    """
    model = require_teacher(recipe)
    if model is None:
        return None
    source = open_weights(recipe.distill.teacher, checksums=False, like=model)
    try:
        theirs = source.tokenizer
    except FileNotFoundError:
        theirs = None
    if theirs and theirs.sha256 != tokenizer.sha256:
        raise ValueError(
            f"distill.teacher={recipe.distill.teacher} has the tokenizer {theirs.sha256} "
            f"({theirs.kind}, {theirs.vocab_size} tokens), and the run's data were made with "
            f"{tokenizer.sha256} ({tokenizer.kind}, {tokenizer.vocab_size} tokens) (sha256 of "
            "the files). Take a teacher with the same tokenizer; if the two only differ in how "
            "their files are written, remove the tokenizer's files from a copy of the teacher")
    return source
