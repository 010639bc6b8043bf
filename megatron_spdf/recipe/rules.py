"""Rules between fields. Each finding names the value, the rule and the remedy; all are reported at
once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from megatron_spdf.architecture.base import Model, divisors
from megatron_spdf.optimizers.base import Optimizer
from megatron_spdf.optimizers.newborn import newborn_violations
from megatron_spdf.recipe.distillation import distill_violations
from megatron_spdf.recipe.recipe import AUTO, ENGINES, Recipe, Stage
from megatron_spdf.sparsity.plan import check_algorithm, check_tensor, make_plan
from megatron_spdf.sparsity.settings import Sparsity


def rule_violations(recipe: Recipe) -> Iterator[str]:
    """Every broken rule of a recipe as one sentence."""
    yield from _model(recipe)
    yield from _parametrization(recipe)
    broken = list(_layout(recipe))
    yield from broken
    for sparsity in [recipe.sparsity, *(stage.sparsity for stage in recipe.stages)]:
        if sparsity.reached != 1.0:
            yield (f"sparsity.reached={sparsity.reached:g} is set by the run itself; leave it out")
        if not broken:
            yield from _plan(recipe.model, sparsity.model_dump_json(), recipe.parallel.tensor)
    yield from _engine(recipe)
    yield from distill_violations(recipe)
    yield from _data(recipe)
    if recipe.kernels.cuda_graph:
        yield from _cuda_graph(recipe)
    yield from _batch(recipe)
    if late := [step for step in recipe.checkpoint.keep_at if step > recipe.steps]:
        yield (f"checkpoint.keep_at={recipe.checkpoint.keep_at} names step {late[0]:,}, and the "
               f"run ends at step {recipe.steps:,} (train.tokens={recipe.train.tokens:,}); leave "
               "it out, or train longer")
    yield from _stages(recipe)
    ends = recipe.stage_ends or [recipe.steps]
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        sparsity = recipe.stages[number].sparsity if recipe.stages else recipe.sparsity
        yield from sparsity.update.rule_violations(end - begin)
        yield from newborn_violations(sparsity.update, recipe.optimizer)


def _model(recipe: Recipe) -> Iterator[str]:
    m = recipe.model
    yield from m.rule_violations()
    if recipe.train.sequence_length > m.max_positions:
        yield (f"train.sequence_length={recipe.train.sequence_length} is over "
               f"model.max_positions={m.max_positions}; lower the first or raise the second")


def _parametrization(recipe: Recipe) -> Iterator[str]:
    if recipe.parametrization == "standard":
        return
    try:
        recipe.optimizer.mup_rate(linear=True, width=1.0, growth=1.0)
    except ValueError as error:
        yield str(error)
    if recipe.parametrization == "density":
        base = recipe.mup_base
        of_mup = {"head_width": None, "input_multiplier": 1.0, "output_multiplier": 1.0}
        yield from (f"mup_base.{key}={getattr(base, key):g} does nothing under "
                    "parametrization=density; leave it out, or set parametrization=mup"
                    for key, idle in of_mup.items() if getattr(base, key) != idle)


def _layout(recipe: Recipe) -> Iterator[str]:
    m, p, t = recipe.model, recipe.parallel, recipe.train
    if p.tensor not in m.tensor_degrees():
        cut = "slices" if m.slices != m.query_groups else "query_groups"
        more = (f", or with model.slices one of {m.possible_slices()}"
                if "slices" in type(m).model_fields else "")
        yield (f"model.{cut}={m.slices} (heads={m.heads}) is not divisible by "
               f"parallel.tensor={p.tensor}; tensor may be {m.tensor_degrees()}{more}")
    stages = p.pipeline * p.interleave
    if m.layers % stages:
        yield (f"model.layers={m.layers} is not divisible by parallel.pipeline x interleave = "
               f"{p.pipeline} x {p.interleave} = {stages}; the product may be {divisors(m.layers)}")
    if p.interleave > 1 and p.pipeline == 1:
        yield (f"parallel.interleave={p.interleave} needs parallel.pipeline > 1; set interleave=1 "
               "or more stages")
    if p.sequence and p.tensor == 1:
        yield ("parallel.sequence=true needs parallel.tensor > 1; set sequence=false or a larger "
               "tensor")
    if p.sequence and t.sequence_length % p.tensor:
        yield (f"train.sequence_length={t.sequence_length} is not divisible by "
               f"parallel.tensor={p.tensor}, as parallel.sequence=true asks; change one of the "
               "three")


@lru_cache(maxsize=256)  # a search over layouts asks thousands of times
def _plan(model: Model, sparsity: str, tensor: int) -> tuple[str, ...]:
    """What a pattern and an algorithm ask of the weights.

    Args:
        sparsity: as JSON, which can be a key.
    """
    section = Sparsity.model_validate_json(sparsity)
    try:
        plan = make_plan(section, model.weights(), model.slices)
        check_tensor(plan, tensor)
        check_algorithm(plan, section)
    except ValueError as error:
        return (str(error),)
    return ()


def _engine(recipe: Recipe) -> Iterator[str]:
    yield from ENGINES.get(recipe.engine).rule_violations(recipe)
    if recipe.parallel.offload and recipe.parallel.zero_stage == 0:
        yield ("parallel.offload=true needs sharded optimizer state, and parallel.zero_stage=0; "
               "set zero_stage=1 or more")


def batch_violations(global_batch: int, micro_batch: int, data: int) -> Iterator[str]:
    """What is wrong where a step cannot be cut into micro-batches, in sequences, for so many
    replicas."""
    share = micro_batch * data
    if global_batch % share:
        below = global_batch // share * share
        yield (f"train.global_batch={global_batch} is not divisible by train.micro_batch x "
               f"parallel.data = {micro_batch} x {data} = {share}; global_batch may be "
               + (f"{below} or " if below else "") + f"{below + share}")


def _batch(recipe: Recipe) -> Iterator[str]:
    if recipe.train.micro_batch == AUTO:
        # where one sequence does not do, no number of them does
        recipe = recipe.with_micro_batch(1)
    p, t = recipe.parallel, recipe.train
    indivisible = list(batch_violations(t.global_batch, t.micro_batch, p.data))
    yield from indivisible
    if not indivisible and p.interleave > 1 and recipe.micro_batches % p.pipeline:
        yield (f"{recipe.micro_batches} micro-batches per step are not divisible by "
               f"parallel.pipeline={p.pipeline}, as parallel.interleave asks; change "
               "train.global_batch or train.micro_batch")
    if recipe.optimizer.warmup_tokens >= recipe.steps * recipe.tokens_per_step:
        yield (f"optimizer.warmup_tokens={recipe.optimizer.warmup_tokens:,} is not under "
               f"train.tokens={t.tokens:,}; shorten the warm-up or lengthen the run")
    elif not recipe.stages:
        yield from _decay(recipe.optimizer, "optimizer", recipe.steps, recipe.tokens_per_step)


def _decay(o: Optimizer | Stage, place: str, steps: int, tokens_per_step: int) -> Iterator[str]:
    """What is wrong with the share of a schedule in which the learning rate falls.

    Args:
        place: of the schedule in the recipe.
        steps: of the schedule.
    """
    if o.decay_share == 1.0:
        return
    decaying, warmup = round(o.decay_share * steps), o.warmup_tokens / tokens_per_step
    if o.decay == "constant":
        yield (f"{place}.decay_share={o.decay_share:g} is of a decay, and {place}.decay=constant; "
               "leave out the share, or take another decay")
    elif not decaying:
        yield (f"{place}.decay_share={o.decay_share:g} of {steps:,} steps is no step; raise it, or "
               "train longer")
    elif warmup + decaying > steps:
        yield (f"{place}.decay_share={o.decay_share:g} of {steps:,} steps begins before the "
               f"warm-up's end at step {warmup:g}; lower the share, shorten warmup_tokens, or set "
               "decay_share=1 to decay from there on")


def _stages(recipe: Recipe) -> Iterator[str]:
    stages = recipe.stages
    if not stages:
        return
    if len(stages) == 1:
        yield ("stages has one entry, and there is no border; add a second, or write sparsity and "
               "optimizer instead")
    total = sum(stage.share for stage in stages)
    if abs(total - 1.0) > 1e-6:
        yield (f"stages: the shares {' + '.join(f'{stage.share:g}' for stage in stages)} = "
               f"{total:g} must add up to 1; change one of them")
    else:
        yield from _schedules_of_stages(recipe)
    if recipe.sparsity.level or recipe.sparsity.rules:
        yield ("sparsity and stages both say what is sparse; leave sparsity out, each stage has "
               "its own")
    if recipe.evaluate.patience:
        yield (f"evaluate.patience={recipe.evaluate.patience} ends a run before its last stage; "
               "set patience=0, or leave out stages")
    ends = recipe.stage_ends
    for number, (before, after) in enumerate(zip(stages, stages[1:], strict=False), 1):
        begins = after.sparsity.update.parts(max(1, ends[number] - ends[number - 1]))[0].reached
        yield from (f"stages.{number}.sparsity: {rule}" for rule in _border(
            recipe.model, before.sparsity.model_dump_json(), after.sparsity.model_copy(
                update={"reached": begins}).model_dump_json()))


@lru_cache(maxsize=256)
def _border(model: Model, before: str, after: str) -> tuple[str, ...]:
    """What does not go at a border between stages, which densifies or prunes by magnitude.

    Args:
        before, after: sparsity as JSON, at the end and at the beginning.
    """
    sections = [Sparsity.model_validate_json(sparsity) for sparsity in (before, after)]
    try:
        there, here = (make_plan(section, model.weights(), model.slices) for section in sections)
    except ValueError:
        return ()  # said by `_plan`
    for name, w in here.weights.items():
        old = there.weights.get(name)
        if old and old.active_per_slice < w.active_per_slice and not w.algorithm.keeps:
            return (f"{name} has {old.active:,} active entries before the border and {w.active:,} "
                    "after it, and nothing says which are born; make the stage dense, or no denser "
                    "than the one before",)
        if not w.pattern.selects:
            return (f"pattern={w.pattern.name} has no mask of the largest magnitudes, which stay "
                    "at a border; begin with this stage, or take another pattern",)
    return ()


def _schedules_of_stages(recipe: Recipe) -> Iterator[str]:
    stage_ends = recipe.stage_ends
    for number, (stage, first,
                 last) in enumerate(zip(recipe.stages, [0, *stage_ends], stage_ends, strict=False)):
        tokens = (last - first) * recipe.tokens_per_step
        if not tokens:
            yield (f"stages.{number}.share={stage.share:g} of {recipe.steps} steps is no step; "
                   "give it more or lengthen the run")
        elif stage.warmup_tokens >= tokens:
            yield (f"stages.{number}.warmup_tokens={stage.warmup_tokens:,} is not under the "
                   f"stage's {tokens:,} tokens; shorten the warm-up or lengthen the stage")
        else:
            yield from _decay(stage, f"stages.{number}", last - first, recipe.tokens_per_step)


def _cuda_graph(recipe: Recipe) -> Iterator[str]:
    """A graph repeats what it has captured, dropout too, and has run on one GPU only."""
    for needed, key, value in (
            (recipe.engine == "megatron", "engine", recipe.engine),
            (recipe.parallel.world == 1, "ranks", recipe.parallel.world),
            (recipe.model.dropout == 0.0, "model.dropout", recipe.model.dropout),
            (recipe.train.recompute == "none", "train.recompute", recipe.train.recompute),
            (not recipe.distill.on, "distill.teacher", recipe.distill.teacher)):
        if not needed:
            yield (f"kernels.cuda_graph=true is for engine=megatron on one rank, without dropout, "
                   f"recomputation or a teacher, and here is {key}={value}; set it to false or "
                   "change that")


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.train and data.blend:
        yield "data.train and data.blend both name training data; keep one of them"
    for source in data.blend:
        if (source.weight is None) == (source.epochs is None):
            yield f"data.blend: {source.path} needs either a weight or epochs"
    if len({source.weight is None for source in data.blend}) > 1:
        yield "data.blend mixes weights and epochs; give one or the other to all data sets"
    idle = {"evaluate.patience": recipe.evaluate.patience,
            "checkpoint.best": recipe.checkpoint.best}
    if (data.train or data.blend) and not data.valid:  # fine-tuning has data of its own
        yield from (f"{key}={str(value).lower()} goes by the validation loss, and data.valid names "
                    "no data; name some, or leave it out" for key, value in idle.items() if value)
    if data.reset_positions and not data.reset_attention and recipe.model.positions == "rotary":
        yield ("data.reset_positions=true does nothing to model.architecture="
               f"{recipe.model.architecture}, whose positions are rotary and so relative; set "
               "reset_attention=true too, or reset_positions=false")
    if data.reset_attention and recipe.kernels.attention != "sdpa":
        yield ("data.reset_attention=true needs kernels.attention=sdpa, and it is "
               f"{recipe.kernels.attention}; change one of them")
