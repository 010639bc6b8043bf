"""The typed recipe: every field of a run with its type, default, unit and meaning."""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_spdf.architecture.base import BY_ARCHITECTURE, Model
from megatron_spdf.optimizers.base import (
    MASTER,
    PRETRAINING,
    SCHEDULE,
    STATE_BYTES,
    Decay,
    Optimizer,
    Pretraining,
)
from megatron_spdf.optimizers.newborn import AGE, Newborn, newborn_of
from megatron_spdf.recipe.distillation import Distill
from megatron_spdf.registry import Registry
from megatron_spdf.section import (
    MOST_POSITIONS,
    MOST_RANKS,
    MOST_SECONDS,
    MOST_SEQUENCES,
    MOST_STEPS,
    MOST_TOKENS,
    MOST_WIDTH,
    Count,
    OneOf,
    Paths,
    PathText,
    Section,
    Seed,
    WithTenants,
    parse_count,
)
from megatron_spdf.sparsity.settings import Sparsity

AUTO = "auto"
# Rows of planning/engines.py
ENGINES: Registry[Any] = Registry("engine", "megatron_spdf.engine.table")
# Beside log.jsonl
LOG_WRITERS: Registry[Any] = Registry("log writer", "megatron_spdf.runs.writers")
def check_micro_batch(value: Any) -> Any:
    if value == AUTO or type(value) is int and 0 < value <= MOST_SEQUENCES:
        return value
    raise PydanticCustomError("micro_batch", "input should be a whole number over 0, or auto"
                              + (f", and at most {MOST_SEQUENCES}" if type(value) is int
                                 and value > 0 else ""))


class BlendSource(Section):
    """A training data set and how much of the samples come from it."""

    path: PathText = Field(description="prefix, or a pattern of prefixes, e.g. `data/pile/train/*`")
    weight: float | None = Field(None, gt=0.0,
                                 description="share of the samples, relative to the other weights")
    epochs: Annotated[float, Field(gt=0.0)] | Literal["pile"] | None = Field(
        None, description="passes relative to the others'; pile: those that the Pile gives its sets"
    )


class Data(Section):
    """Where tokens come from: prefixes of Megatron's indexed datasets (PREFIX.bin, PREFIX.idx)."""

    train: Paths = Field([],
                         description="prefixes of the training data, drawn in proportion to their "
                                     "size")
    blend: list[BlendSource] = Field(
        [], description="instead of train: data sets with weights, or with epochs, all in the same "
                        "form")
    on_blend_change: Literal["refuse", "continue"] = Field(
        "refuse", description="when a run goes on with another blend; continue: each source goes "
                              "on where it was")
    valid: Paths = Field([], description="prefixes of the validation data; none: no evaluation")
    tokenizer: PathText | None = Field(
        None, description="directory or file; default: the copy beside the data"
    )
    end_of_document: str | None = Field(
        None, description="token that ends documents; default: what the tokenizer says")
    workers: int = Field(2, ge=0, le=1024,
                         description="loader processes per rank; 0 loads in the training process")
    index_cache: PathText | None = Field(
        None, description="directory of the sample indices; default: inside the run")
    reset_positions: bool = Field(False,
                                  description="positions start at 0 with every document of a "
                                              "sequence")
    reset_attention: bool = Field(False, description="tokens attend to their own document only")


class Train(Section):
    tokens: Count = Field(gt=0, le=MOST_TOKENS, description="length of the run, in tokens")
    global_batch: Count = Field(gt=0, le=MOST_SEQUENCES,
                                description="sequences per optimizer step, over all ranks")
    micro_batch: Annotated[int | Literal["auto"], BeforeValidator(check_micro_batch)] = Field(
        description="sequences per forward pass of one data-parallel rank; auto: what is fastest, "
                    "tried at the start")
    sequence_length: Count = Field(gt=0, le=MOST_POSITIONS,
                                   description="tokens per sequence; default: model.max_positions, "
                                               "where they are rotary at most 4096")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of weights and activations; gradients, master weights and moments are "
                            "fp32")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in backward: the attention core, or whole "
                            "blocks")
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=1.0,
        description="share of the target spread evenly over the vocabulary while training")


def _usual_length(model: dict[str, Any]) -> int:
    """The default of train.sequence_length for a model's section, which may be wrong."""
    preset = model.get("preset")
    try:
        family = BY_ARCHITECTURE.section(model)
        known = family.PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        given = {key: value for key, value in model.items() if value is not None}
        longest = parse_count({**known, **given}.get("max_positions", 2048))
    except ValueError:  # validation says what is wrong with its name
        return 2048
    if type(longest) is not int or not 0 < longest <= MOST_POSITIONS:
        return 1  # and with that
    return family.usual_length(longest)


class Stage(Section):
    """A stretch of a run with a sparsity and a schedule of its own; what it leaves out is the
    optimizer's."""

    share: float = Field(gt=0.0, lt=1.0, description="of the run's tokens; the shares add up to 1")
    sparsity: Sparsity = Field(description="in this stage; dense, or no denser than before")
    lr: float = Optimizer.model_fields["lr"]
    embedding_lr: float | None = Optimizer.model_fields["embedding_lr"]
    norm_lr: float | None = Optimizer.model_fields["norm_lr"]
    min_lr_ratio: float = Optimizer.model_fields["min_lr_ratio"]
    decay: Decay = Optimizer.model_fields["decay"]
    decay_share: float = Optimizer.model_fields["decay_share"]
    warmup_tokens: Count = Pretraining.model_fields["warmup_tokens"]


class Parallel(Section):
    """The layout. The world has tensor x pipeline x data processes, one per GPU."""

    tensor: int = Field(1, gt=0, le=MOST_RANKS,
                        description="tensor-parallel degree; divides model.query_groups")
    sequence: bool = Field(False,
                           description="sequence parallelism inside the tensor-parallel group")
    pipeline: int = Field(1, gt=0, le=MOST_RANKS, description="pipeline stages")
    interleave: int = Field(1, gt=0, le=MOST_RANKS,
                            description="model chunks per pipeline rank (virtual stages)")
    data: int = Field(1, gt=0, le=MOST_RANKS,
                      description="data-parallel degree; auto: as many as the processes that were "
                                  "started make up")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="sharded over data-parallel ranks: 1 optimizer state, 2 gradients too, 3 "
                       "parameters too; 2 and 3 need engine=deepspeed, whose 0 adds bf16 gradients "
                       "up in bf16")
    offload: bool = Field(False,
                          description="optimizer state in the host's memory; needs "
                                      "engine=deepspeed and ZeRO")
    overlap: bool = Field(True,
                          description="gradient and parameter traffic behind compute, on GPUs")
    timeout: int = Field(600, gt=0, le=MOST_SECONDS,
                         description="seconds after which a collective that hangs ends the run")

    @property
    def world(self) -> int:
        """Processes the layout needs."""
        return self.tensor * self.pipeline * self.data


class Evaluate(Section):
    every: int = Field(0, ge=0, le=MOST_STEPS,
                       description="steps between evaluations; 0: only at the end")
    batches: int = Field(10, gt=0, le=MOST_STEPS,
                         description="global batches per evaluation, at most what the data holds")
    patience: int = Field(0, ge=0, le=MOST_STEPS,
                          description="evaluations in a row without a lower loss after which the "
                                      "run ends; 0: never")


class Checkpoint(Section):
    every: int = Field(1000, ge=0, le=MOST_STEPS,
                       description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, gt=0, le=MOST_STEPS, description="newest checkpoints that are kept")
    keep_every: int = Field(0, ge=0, le=MOST_STEPS,
                            description="also keep those of every step that this divides; 0: none")
    keep_at: list[Annotated[int, Field(gt=0, le=MOST_STEPS)]] = Field(
        [], description="also save after these steps, and keep that")
    best: bool = Field(False,
                       description="save whenever the validation loss is the lowest yet, and keep "
                                   "that one too")
    asynchronous: bool = Field(
        True, description="write behind the next steps; the loop waits for the copy out of the "
                          "device only")


class Log(Section):
    every: int = Field(10, gt=0, le=MOST_STEPS,
                       description="steps between records in log.jsonl and what goes beside it")
    ranks_every: int = Field(100, ge=0, le=MOST_STEPS,
                             description="steps between gathers of every rank's own step time; 0: "
                                         "never")
    slow_factor: float = Field(
        1.3, gt=1.0, description="ranks whose own step time is over the median's by this factor "
                                 "are named")


# Every writer adds a key: `log: {tensorboard: true, wandb: my_project}`.
LOG = WithTenants(LOG_WRITERS, Log, lambda writer: (writer.type, writer.field))


class FaultTolerance(Section):
    max_skipped: int = Field(10, ge=0, le=MOST_STEPS,
                             description="steps skipped in a row for a non-finite loss or gradient"
                                         " before the run stops")
    max_failed_saves: int = Field(1, ge=0, le=MOST_STEPS,
                                  description="saves that may fail in a row (a full disk) before "
                                              "the run stops")
    max_starts: int = Field(3, gt=0, le=MOST_STEPS,
                            description="starts in a row without a new checkpoint after which "
                                        "launch scripts give up")
    join_seconds: float = Field(300.0, gt=0.0, le=MOST_SECONDS,
                                description="that a start waits for its last rank")
    hang_seconds: float = Field(300.0, gt=0.0, le=MOST_SECONDS,
                                description="after which a rank that is silent, or a step that "
                                            "stands still, ends the run; under parallel.timeout, "
                                            "to name the rank before a collective gives up")


class Kernels(Section):
    """Which implementation computes what; the choice is logged at start."""

    attention: Literal["sdpa", "transformer_engine"] = Field(
        "sdpa", description="PyTorch's scaled_dot_product_attention, or Transformer Engine's where "
                            "installed")
    norm: Literal["auto", "torch"] = Field("auto",
                                           description="auto: NVIDIA Apex's fused LayerNorm where "
                                                       "installed")
    cuda_graph: bool = Field(False, description="forward and backward of a step are one launch, "
                                                "for where the host is busier than the GPU; one "
                                                "GPU, no dropout, no recomputation")


class MupBase(Section):
    """The model whose hyper-parameters `parametrization: mup` carries over to the recipe's;
    `density` takes its density alone."""

    hidden: int = Field(256, gt=0, le=MOST_WIDTH, description="its width")
    head_width: int | None = Field(
        None, gt=0, le=MOST_WIDTH,
        description="d_base of its attention heads, for Q K^T x sqrt(d_base) / d; default: the "
                    "recipe's d, as where a wider model has more heads of one size")
    density: float = Field(1.0, gt=0.0, le=1.0, description="of its linear weights")
    input_multiplier: float = Field(1.0, gt=0.0,
                                    description="of the embeddings' output, at every width")
    output_multiplier: float = Field(1.0, gt=0.0,
                                     description="of the LM head's input; over the width's growth")


class Recipe(Section):
    """One run."""

    output: PathText = Field(description="run directory; everything the run writes goes there")
    seed: Seed = Field(1234, description="of initial weights, data order and dropout")
    engine: Annotated[str, OneOf(ENGINES)] = Field("megatron", description="who runs a step")
    deepspeed: PathText | None = Field(
        None, description="JSON file of further DeepSpeed settings, see configs/deepspeed")
    model: Annotated[Model, BY_ARCHITECTURE]
    parametrization: Literal["standard", "mup", "density"] = Field(
        "standard", description="mup: initial values, learning rates and multipliers follow width "
                                "and density; density: initial values and learning rates follow "
                                "density alone")
    mup_base: MupBase = Field(MupBase())
    # not made yet: algorithms of plugins may need this module
    sparsity: Sparsity = Field(default_factory=Sparsity)
    stages: list[Stage] = Field(
        [], description="instead of one sparsity and learning rate: those of one stretch of the "
                        "run after the other")
    data: Data = Field(Data())
    train: Train
    optimizer: Annotated[Optimizer, PRETRAINING]
    distill: Distill = Field(Distill())
    parallel: Parallel = Field(Parallel())
    evaluate: Evaluate = Field(Evaluate())
    checkpoint: Checkpoint = Field(Checkpoint())
    log: Annotated[Log, LOG] = Field(default_factory=lambda: LOG.section()())
    fault_tolerance: FaultTolerance = Field(FaultTolerance())
    kernels: Kernels = Field(Kernels())

    @model_validator(mode="before")
    @classmethod
    def _sequence_length(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        model, train = values.get("model"), values.get("train")
        if isinstance(model, dict) and isinstance(train, dict) and "sequence_length" not in train:
            train = {**train, "sequence_length": _usual_length(model)}
            values = {**values, "train": train}
        return values

    @model_validator(mode="before")
    @classmethod
    def _schedules_of_stages(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("optimizer"), dict):
            return values
        stages = values.get("stages")
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            return values
        schedule = {key: values["optimizer"][key] for key in SCHEDULE if key in values["optimizer"]}
        return {**values, "stages": [{**schedule, **stage} for stage in stages]}

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.train.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: train.tokens to the nearest whole batch, at least one."""
        return max(1, round(self.train.tokens / self.tokens_per_step))

    @property
    def decay_tokens(self) -> int:
        """Tokens at the end of a run of one schedule in which the learning rate falls."""
        o = self.optimizer
        if o.decay == "constant":
            return 0
        if o.decay_share == 1.0:
            return self.steps * self.tokens_per_step - o.warmup_tokens
        return round(o.decay_share * self.steps) * self.tokens_per_step

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a data-parallel rank accumulates per step."""
        assert self.train.micro_batch != AUTO, "the run has not settled it yet"
        return self.train.global_batch // (self.train.micro_batch * self.parallel.data)

    @property
    def newborn(self) -> Newborn | None:
        """What corrects the optimizer's state of values that are born; None: nothing does."""
        return newborn_of(self.sparsity.update, self.optimizer)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the optimizer's state for every parameter, beside the master weight: its own,
        and the ages of what is born where they count."""
        return (*self.optimizer.states, *([AGE] if self.newborn else []))

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of what a checkpoint holds for every parameter: master weight and named state."""
        return (MASTER, *self.states)

    @property
    def state_bytes(self) -> int:
        """Bytes of the named state for one entry of a parameter, without its master weight."""
        return self.optimizer.state_bytes + STATE_BYTES * (self.newborn is not None)

    @property
    def stage_ends(self) -> list[int]:
        """The last step of every stage."""
        return [round(self.steps * share)
                for share in accumulate(stage.share for stage in self.stages)]

    def with_micro_batch(self, size: int) -> Recipe:
        return self.model_copy(
            update={"train": self.train.model_copy(update={"micro_batch": size})}
        )

    def in_stage(self, number: int) -> Recipe:
        """The recipe with the sparsity and the schedule of one of its stages, as that one's
        checkpoints have it."""
        stage = self.stages[number]
        optimizer = self.optimizer.model_copy(update={key: getattr(stage, key) for key in SCHEDULE})
        return self.model_copy(update={"sparsity": stage.sparsity, "optimizer": optimizer})

    def stored_at(self, reached: float) -> Recipe:
        """The recipe of a part of a run that stores sparse weights at this share of their
        levels."""
        if reached == self.sparsity.reached:
            return self
        return self.model_copy(
            update={"sparsity": self.sparsity.model_copy(update={"reached": reached})})

    def without_stages(self) -> Recipe:
        """The recipe of all stages: `in_stage` undone, as far as a recipe with stages reads it."""
        return self.model_copy(update={"sparsity": Sparsity()}) if self.stages else self

    def identity(self) -> dict[str, Any]:
        """What must not change between the starts of one run; layout, logging and the like may."""
        kept = self.model_dump(include={"seed", "model", "parametrization", "mup_base", "sparsity",
                                        "stages", "data",
                                        "train", "optimizer", "distill"})
        if not self.distill.on:
            kept.pop("distill")
        for sparsity in [kept["sparsity"], *(stage["sparsity"] for stage in kept["stages"])]:
            sparsity.pop("dense_copy"), sparsity.pop("reached")
        if self.stages:  # they say it all
            kept.pop("sparsity")
            for key in SCHEDULE:
                kept["optimizer"].pop(key)
        if self.parametrization == "standard":
            kept.pop("mup_base")
        if self.parametrization == "density":
            kept["mup_base"] = {"density": self.mup_base.density}
        kept["model"].pop("preset", None)
        for section, key in (("data", "workers"), ("data", "index_cache"), ("data", "tokenizer"),
                             ("data", "end_of_document"), ("data", "on_blend_change"),
                             ("train", "micro_batch"),
                             ("train", "recompute")):
            kept[section].pop(key)
        return kept
