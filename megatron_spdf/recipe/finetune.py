"""The typed recipe of a fine-tuning run, and the recipe of a training run that it comes to.

What a step is, is the same before and after: the engines, the loop and the checkpoints know one
kind of recipe. Of a fine-tuning run it follows from this one, the starting checkpoint's model and
the number of examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_spdf.architecture.base import Model
from megatron_spdf.optimizers.base import FINETUNING, Optimizer
from megatron_spdf.recipe.distillation import Distill
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import (
    ENGINES,
    LOG,
    Checkpoint,
    Data,
    Evaluate,
    FaultTolerance,
    Kernels,
    Log,
    Parallel,
    Recipe,
    Train,
)
from megatron_spdf.recipe.rules import batch_violations, rule_violations
from megatron_spdf.section import (
    MOST_POSITIONS,
    MOST_SEQUENCES,
    MOST_STEPS,
    Count,
    OneOf,
    PathText,
    Section,
    Seed,
)
from megatron_spdf.sparsity.settings import Sparsity
from megatron_spdf.text import counted


class TaskData(Section):
    """Contexts and completions, see megatron_spdf/data/finetuning/tasks."""

    task: str = Field(description="format and scores of the data, one of the tasks above; "
                                  "jsonl: your own, lines of {context, completion}")
    path: PathText = Field(description="directory with the splits under the names they are "
                                       "published with")
    too_long: Literal["refuse", "leave_out"] = Field(
        "refuse", description="pairs whose completion alone does not fit sequence_length: the run "
                              "is refused, or they are left out and counted")


class Batches(Section):
    epochs: int = Field(5, gt=0, le=MOST_STEPS, description="passes over the training examples")
    global_batch: Count = Field(gt=0, le=MOST_SEQUENCES,
                                description="examples per optimizer step, over all ranks")
    micro_batch: int = Field(gt=0, le=MOST_SEQUENCES,
                             description="examples per forward pass of one data-parallel rank")
    sequence_length: Count | None = Field(
        None, gt=0, le=MOST_POSITIONS,
        description="longest context and completion, in tokens; default: the model's "
                    "max_positions")
    precision: Literal["bf16", "fp32"] = Train.model_fields["precision"]
    recompute: Literal["none", "selective", "full"] = Train.model_fields["recompute"]
    label_smoothing: float = Train.model_fields["label_smoothing"]
    dropout: float | None = Field(None, ge=0.0, lt=1.0, description="default: the starting model's")


class Validation(Section):
    every: int = Field(0, ge=0, le=MOST_STEPS,
                       description="steps between evaluations; 0: once an epoch")
    patience: int = Evaluate.model_fields["patience"]


class Saving(Section):
    every: int = Field(0, ge=0, le=MOST_STEPS,
                       description="steps between checkpoints; 0: the best and the last only")
    keep: int = Field(1, gt=0, le=MOST_STEPS,
                      description="newest checkpoints that are kept, beside the best")


class Finetune(Section):
    """One fine-tuning run."""

    checkpoint: PathText = Field(description="where to start: a run, a checkpoint of one, or a "
                                             "Hugging Face directory")
    output: PathText = Field(description="run directory; everything the run writes goes there")
    seed: Seed = Field(1234, description="of data order, dropout and revived weights")
    mode: Literal["dense", "sparse"] = Field(
        "dense", description="dense: every weight trains; sparse: the starting checkpoint's mask "
                             "holds to the end")
    revived: Literal["zeros", "normal"] = Field(
        "zeros", description="weights that the dense mode revives: zero, or normal with "
                             "revived_scale x initial std")
    revived_scale: float = Field(1.0, gt=0.0,
                                 description="std of revived=normal over the weight's initial std")
    engine: Annotated[str, OneOf(ENGINES)] = Field("deepspeed", description="who runs a step")
    deepspeed: PathText | None = Recipe.model_fields["deepspeed"]
    data: TaskData
    train: Batches
    optimizer: Annotated[Optimizer, FINETUNING]
    distill: Distill = Field(Distill())
    parallel: Parallel = Field(Parallel())
    evaluate: Validation = Field(Validation())
    save: Saving = Field(Saving())
    log: Annotated[Log, LOG] = Recipe.model_fields["log"]
    fault_tolerance: FaultTolerance = Field(FaultTolerance())
    kernels: Kernels = Field(Kernels())
    sweep: dict[str, list[Any]] = Field(
        {}, description="values to try, {optimizer.lr: [1e-4, 5e-5], ...}: one run for each "
                        "combination, tools/sweep.py")

    def identity(self) -> dict[str, Any]:
        """What must not change between the starts of one run; layout, engine, logging and the like
        may."""
        kept = self.model_dump(include={"checkpoint", "seed", "mode", "revived", "revived_scale",
                                        "data", "train",
                                        "optimizer", "evaluate", "distill"})
        if not self.distill.on:
            kept.pop("distill")
        for key in ("micro_batch", "recompute"):
            kept["train"].pop(key)
        return kept

    def window(self, model: Model) -> int:
        """Longest sequence of the run, in tokens."""
        return self.train.sequence_length or model.usual_length(model.max_positions)

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps of an epoch; its last batch may be short."""
        return -(-examples // self.train.global_batch)


def load_finetune(path: str | Path, overrides: list[str] | tuple[str, ...] = (),
                  world: int = 1) -> Finetune:
    """`load_recipe` for a fine-tuning recipe."""
    return load_recipe(path, overrides, world, Finetune, _finetune_violations)


def training_recipe(finetune: Finetune, model: Model, sparsity: Sparsity, examples: int) -> Recipe:
    """The recipe of the training run that a fine-tuning run is.

    Its tokens are nominal, every sequence counted with full length, so that its schedules go by
    steps.

    Args:
        model, sparsity: of the starting checkpoint.
        examples: pairs of context and completion in an epoch.

    Raises:
        ValueError: naming every broken rule between the recipe, the model and the data.
    """
    f, t, o = finetune, finetune.train, finetune.optimizer
    if t.dropout is not None:
        model = model.model_copy(update={"dropout": t.dropout})
    length = f.window(model)
    per_step, per_epoch = t.global_batch * length, f.steps_per_epoch(examples)
    steps = t.epochs * per_epoch
    if o.warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps={o.warmup_steps} is not under the run's {steps} "
                         f"steps ({counted(t.epochs, 'epoch')} of {per_epoch}); shorten the "
                         "warm-up or train longer")
    recipe = Recipe(
        output=f.output, seed=f.seed, engine=f.engine, deepspeed=f.deepspeed, model=model,
        sparsity=sparsity if f.mode == "sparse" else Sparsity(),
        data=Data(),
        train=Train(tokens=steps * per_step, sequence_length=length,
                    **t.model_dump(exclude={"epochs", "sequence_length", "dropout"})),
        optimizer={"warmup_tokens": o.warmup_steps * per_step,
                   **o.model_dump(exclude={"warmup_steps"})},
        distill=f.distill, parallel=f.parallel,
        evaluate=Evaluate(every=f.evaluate.every or per_epoch, patience=f.evaluate.patience),
        checkpoint=Checkpoint(every=f.save.every, keep=f.save.keep, best=True),
        log=f.log, fault_tolerance=f.fault_tolerance, kernels=f.kernels)
    assert recipe.steps == steps, (recipe.steps, steps)
    broken = list(rule_violations(recipe))
    if broken:
        raise ValueError("the fine-tuning recipe does not fit:\n"
                         + "\n".join(f"  - {b}" for b in broken))
    return recipe


def _finetune_violations(finetune: Finetune) -> Iterator[str]:
    p, t = finetune.parallel, finetune.train
    yield from batch_violations(t.global_batch, t.micro_batch, p.data)
    if p.pipeline > 1:
        yield (f"parallel.pipeline={p.pipeline}: pipeline stages here know sequences of one length "
               "only, and examples differ; set pipeline=1 and a larger tensor or zero_stage")
    if finetune.mode == "sparse" and finetune.revived != "zeros":
        yield (f"revived={finetune.revived} revives weights, and mode=sparse keeps the mask; set "
               "revived=zeros or mode=dense")
