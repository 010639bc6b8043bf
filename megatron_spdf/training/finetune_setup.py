"""Checks of a fine-tuning run against its starting checkpoint and its data, without a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spdf.checkpoint.reader import CheckpointReader
from megatron_spdf.checkpoint.run_metadata import Masks, seeded_masks
from megatron_spdf.convert.source import WeightSource, fingerprint, require_sound, tokenizer_of
from megatron_spdf.data.finetuning.completions import (
    CompletionData,
    Completions,
    require_fit,
    tokenize,
)
from megatron_spdf.data.finetuning.task import TASKS, count_pairs, require_splits
from megatron_spdf.data.tokenizers.base import Tokenizer, render_padding
from megatron_spdf.model.parametrization import render_parametrization
from megatron_spdf.planning.memory import render_layout
from megatron_spdf.recipe.finetune import Finetune, training_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan, check_tensor, render_plan
from megatron_spdf.sparsity.settings import Sparsity
from megatron_spdf.text import counted
from megatron_spdf.training.teacher import Teacher

if TYPE_CHECKING:  # these import megatron.core
    from megatron_spdf.engine.base import Engine
    from megatron_spdf.model.init import LoadedWeights


@dataclass(frozen=True)
class Prepared:
    """A fine-tuning run that has passed its checks.

    Attributes:
        start: the weights that it starts from.
        recipe: its translation to a training run.
        plan: the weights that stay sparse.
        teacher: that it distills from.
        masks, origin: recorded in its checkpoints.
        summary: for the log.
    """

    finetune: Finetune
    start: WeightSource
    recipe: Recipe
    plan: Plan
    tokenizer: Tokenizer
    train: Completions
    valid: Completions
    teacher: Teacher
    masks: Masks
    origin: str
    summary: str

    @property
    def contents(self) -> dict[str, str]:
        """Keys of the recipe that name inputs -> hash of what lies there."""
        return {"data.path": f"{self.train.sha256} {self.valid.sha256}",
                "checkpoint": fingerprint(self.start), **self.teacher.contents}

    def make_data(self, recipe: Recipe, engine: Engine) -> CompletionData:
        """Makes this rank's batches."""
        return CompletionData(recipe, self.train, self.valid, self.tokenizer.eod,
                              engine.data_parallel_rank)

    def make_weights(self) -> LoadedWeights:
        """Opens the starting weights, and draws those that the dense mode revives."""
        from megatron_spdf.model.init import LoadedWeights  # imports megatron.core

        finetune, start = self.finetune, self.start
        revived = finetune.revived_scale if finetune.revived == "normal" else 0.0
        masks, held = (start.mask_bits, start.held_bits) if self.plan.weights else (None, None)
        return LoadedWeights(start.master, masks, revived, finetune.seed,
                             self.recipe.model.slices, held)


def prepare(finetune: Finetune, start: WeightSource) -> Prepared:
    """Checks a fine-tuning recipe against its starting weights and its data.

    Raises:
        ValueError, FileNotFoundError: naming the value, the rule and the remedy.
    """
    model, path = start.model, Path(finetune.data.path)
    require_splits(finetune.data.task, path)
    tokenizer = tokenizer_of(start)
    window = min(finetune.window(model), model.max_positions)
    train, valid = (tokenize(finetune.data.task, path, split, tokenizer, window,
                             finetune.data.too_long) for split in ("train", "validation"))
    recipe = training_recipe(finetune, model, _sparsity(finetune, start), len(train))
    plan = Plan.of(recipe)
    check_tensor(plan, recipe.parallel.tensor)
    require_sound(start)
    teacher = Teacher(recipe, tokenizer)
    summary = _summary(finetune, start, recipe, plan, tokenizer, train, valid)
    return Prepared(
        finetune, start, recipe, plan, tokenizer, train, valid, teacher,
        masks=start.masks if plan.weights else seeded_masks(plan),
        origin=f"{finetune.mode} fine-tuning from {start.origin}",
        summary="\n".join(filter(None, [summary, teacher.summary])))


def check_rules(finetune: Finetune, start: WeightSource) -> None:
    """Raises what `prepare` would of a recipe, its start, its teacher, the number of its pairs and
    completions that do not fit: for many runs, ahead of the first.

    Raises:
        ValueError, FileNotFoundError: naming the value, the rule and the remedy.
    """
    pairs = count_pairs(finetune.data.task, finetune.data.path)
    recipe = training_recipe(finetune, start.model, _sparsity(finetune, start), pairs)
    check_tensor(Plan.of(recipe), recipe.parallel.tensor)
    tokenizer = tokenizer_of(start)
    Teacher(recipe, tokenizer)
    for split in ("train", "validation"):
        require_fit(finetune.data.task, Path(finetune.data.path), split, tokenizer,
                    finetune.window(start.model), finetune.data.too_long)


def _sparsity(finetune: Finetune, start: WeightSource) -> Sparsity:
    """Sparsity of the training run: none in dense mode, that of the start in sparse mode."""
    if finetune.mode == "dense":
        return Sparsity()
    if not isinstance(start, CheckpointReader) or not start.plan.weights:
        raise ValueError(f"mode=sparse keeps the mask of the start, and checkpoint={start.path} "
                         "has none; start from a sparse run, or set mode=dense")
    return start.recipe.sparsity.held()


def _summary(finetune: Finetune, start: WeightSource, recipe: Recipe, plan: Plan,
             tokenizer: Tokenizer, train: Completions, valid: Completions) -> str:
    """Start, data, plan and layout, as lines for the log."""
    mode = {"dense": "dense, revived weights start "
                     f"{'at zero' if finetune.revived == 'zeros' else 'normal'}",
             "sparse": "sparse, the mask holds"}[finetune.mode]
    lines = [
        f"starting from {start.origin}, {start.path}; {mode}",
        f"{finetune.data.task}: {len(train):,} training and {len(valid):,} validation pairs of "
        f"{train.lengths.mean():.0f} tokens on average; "
        f"{counted(finetune.train.epochs, 'epoch')} of {finetune.steps_per_epoch(len(train)):,} "
        "steps"]
    loses = TASKS.get(finetune.data.task).loses
    lines += [f"{pairs.truncated:,} {split} contexts lost their {loses} to fit "
              f"{recipe.train.sequence_length} tokens"
              for split, pairs in (("training", train), ("validation", valid)) if pairs.truncated]
    lines += [f"{pairs.left_out:,} {split} pairs are left out, whose completions alone do not fit"
              for split, pairs in (("training", train), ("validation", valid)) if pairs.left_out]
    lines.append(render_padding(tokenizer, start.model.vocab_size))
    rates = render_parametrization(recipe, plan, recipe.model.weights())
    return "\n".join(filter(None, [*lines, render_plan(plan), rates, render_layout(recipe, plan)]))
