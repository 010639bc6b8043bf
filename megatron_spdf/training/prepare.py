"""What a fine-tuning run asks of its starting checkpoint and its data before it touches a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_spdf.checkpoint.reader import CheckpointReader
from megatron_spdf.config import Recipe
from megatron_spdf.config.finetune import Finetune, training_recipe
from megatron_spdf.data.finetuning import Completions, tokenise
from megatron_spdf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.model.weights import model_weights
from megatron_spdf.planning.memory import render_layout
from megatron_spdf.sparsity.plan import Plan, make_plan, render_plan


@dataclass(frozen=True)
class Prepared:
    """A fine-tuning run, ready to start.

    Attributes:
        recipe: of the training run that it comes to.
        plan: what stays sparse.
        summary: for people.
    """

    recipe: Recipe
    plan: Plan
    tokenizer: Tokenizer
    train: Completions
    valid: Completions
    summary: str


def prepare(finetune: Finetune, start: CheckpointReader) -> Prepared:
    """Checks a fine-tuning recipe against its starting checkpoint and its data.

    Raises:
        ValueError, FileNotFoundError: with the value, the rule and the remedy.
    """
    model, path = start.recipe.model, Path(finetune.data.path)
    tokenizer = _tokenizer(start)
    window = min(finetune.train.sequence_length or model.max_positions, model.max_positions)
    train, valid = (tokenise(finetune.data.task, path, split, tokenizer, window) for split in ("train", "validation"))
    recipe = training_recipe(finetune, model, start.recipe.sparsity, len(train))
    plan = make_plan(recipe.sparsity, model_weights(recipe.model), recipe.model.query_groups)
    return Prepared(recipe, plan, tokenizer, train, valid, _summary(finetune, start, recipe, plan, train, valid))


def _tokenizer(start: CheckpointReader) -> Tokenizer:
    """The tokenizer that the starting model was trained with."""
    try:
        tokenizer = load_tokenizer(start.path / "tokenizer")
    except FileNotFoundError:
        raise ValueError(f"{start.path} has no tokenizer/, and a model means nothing without the tokenizer it was "
                         "trained with; use a checkpoint of pretrain.py as it was written") from None
    if tokenizer.sha256 != start.run["tokenizer"]["sha256"]:
        raise ValueError(f"{start.path}/tokenizer is another tokenizer (sha256 {tokenizer.sha256[:16]}) than the model "
                         f"was trained with ({start.run['tokenizer']['sha256'][:16]}); put that one back")
    return tokenizer


def _summary(
    finetune: Finetune, start: CheckpointReader, recipe: Recipe, plan: Plan, train: Completions, valid: Completions
) -> str:
    phase = {"dense": f"dense, revived weights start {'at zero' if finetune.revived == 'zeros' else 'normal'}",
             "sparse": "sparse, the mask holds"}[finetune.phase]
    lines = [
        f"starting from {start.path}; {phase}",
        f"{finetune.data.task}: {len(train):,} training and {len(valid):,} validation pairs of "
        f"{train.lengths.mean():.0f} tokens on average; {finetune.train.epochs} epochs of "
        f"{finetune.steps_per_epoch(len(train)):,} steps"]
    lines += [f"{pairs.truncated:,} {split} contexts lost their beginning to fit {recipe.train.sequence_length} tokens"
              for split, pairs in (("training", train), ("validation", valid)) if pairs.truncated]
    return "\n".join([*lines, render_plan(plan), render_layout(recipe, plan)])
