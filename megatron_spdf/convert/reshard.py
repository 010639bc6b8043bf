"""Rewrites a checkpoint, optimizer and run state included, as a run directory of its own: with its
files cut for another layout, or to go on with another length and schedule."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

from megatron_spdf.architecture.base import Weight, divisors
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.inspect import wrong_shapes
from megatron_spdf.checkpoint.reader import (
    OPTIMIZER,
    VALUES,
    CheckpointReader,
    stored_name,
)
from megatron_spdf.checkpoint.writer import StoredTensor, cut, write_tensors
from megatron_spdf.convert.initial_checkpoint import CHECKPOINTS, RECIPE, finish_run
from megatron_spdf.data.pretraining.blend import HISTORY
from megatron_spdf.files import atomic_directory, write_file, write_json
from megatron_spdf.recipe.compare import AFTER_THE_PEAK, changes_so_far
from megatron_spdf.recipe.recipe import Parallel, Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.schedule.stages import stages_of

LOG = "log.jsonl"  # as in runs/measured.py


def reshard(reader: CheckpointReader, parallel: Parallel, output: Path) -> Path:
    """Rewrites a checkpoint, optimizer and progress included, as a run directory of its own.

    Args:
        reader: of the checkpoint.
        parallel: layout of the new files and the new recipe; see `check_layout`.
        output: directory, which must not exist.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: the model cannot have that layout, or `output` exists.
        DamagedCheckpoint: a tensor is missing or has another shape than the recipe says.
    """
    recipe = reader.recipe.model_copy(update={"parallel": parallel, "output": str(output)})
    check_layout(recipe.without_stages())
    return _rewrite(reader, recipe, recipe.without_stages(), output)


def branch(reader: CheckpointReader, recipe: Recipe, output: Path) -> Path:
    """Rewrites a checkpoint as a run that goes on from there with another length, and another fall
    of the learning rate: from a trunk at the peak of the rate to its end (WSD).

    Args:
        reader: of the checkpoint.
        recipe: of the new run.
        output: its directory, which must not exist; the log of the steps so far is copied.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: the steps so far would not have been the same, or none are left; `output`
            exists.
        DamagedCheckpoint: see `reshard`.
    """
    step, data = reader.run["state"]["step"], recipe.data
    if not (data.train or data.blend):
        raise ValueError(f"{reader.path} is of a fine-tuning run, whose length is in epochs; "
                         "fine-tune its start again with another recipe")
    changes = changes_so_far(reader.recipe, recipe, step)
    if changes:
        raise ValueError(f"{reader.path} cannot go on so, as its steps up to {step:,} would have "
                         f"been others: {'; '.join(changes)}. A branch may change "
                         f"{', '.join(AFTER_THE_PEAK)} where the learning rate is at its peak, "
                         "masks have moved alike and there are no stages; take an earlier "
                         "checkpoint, or a later beginning of the decay")
    if step >= recipe.steps:
        raise ValueError(f"{reader.path} is at step {step:,}, and train.tokens="
                         f"{recipe.train.tokens:,} are {recipe.steps:,} steps; give more tokens")
    now = next(stage.recipe for stage in stages_of(recipe) if step <= stage.last)
    return _rewrite(reader, now, recipe, output)


def _rewrite(reader: CheckpointReader, recipe: Recipe, whole: Recipe, output: Path) -> Path:
    """Writes the new run directory, and returns its checkpoint.

    Args:
        recipe: that the checkpoint records, of a part of the run.
        whole: of the run.
    """
    faults = wrong_shapes(reader)
    if faults:
        raise store.DamagedCheckpoint(f"checkpoint {reader.path} is not what its recipe says: "
                                      f"{'; '.join(faults[:5])}")
    place = Path(CHECKPOINTS) / store.name_of(reader.run["state"]["step"])
    with atomic_directory(output) as directory:
        checkpoint = directory / place
        checkpoint.mkdir(parents=True)
        write_tensors(checkpoint,
                      [t for w in reader.weights.values() for t in _tensors_of(w, reader, recipe)])
        reader.tokenizer.save(checkpoint / "tokenizer")
        write_json(checkpoint / store.RUN, {**reader.run, "recipe": recipe.model_dump()})
        finish_run(checkpoint, whole)
        _carry(reader.path.parents[1], directory)
    return output / place


def _carry(run: Path, directory: Path) -> None:
    """Copies what a run keeps beside its checkpoints of the steps so far: blends and log."""
    for name in (HISTORY, LOG):
        if (run / RECIPE).is_file() and (run / name).is_file():
            write_file(directory / name, (run / name).read_bytes())


def _tensors_of(weight: Weight, reader: CheckpointReader, recipe: Recipe) -> list[StoredTensor]:
    """Tensors of one parameter: values, mask and optimizer state."""
    sparse, name = weight.name in reader.plan.weights, stored_name(weight.name)
    axis, kept = (0, name + VALUES) if sparse else (weight.axis, name)
    names = [kept, *(f"{OPTIMIZER}{state}.{kept}" for state in recipe.saved)]
    names += reader.side_bits(weight.name) if sparse else []
    return [StoredTensor(n, reader.shapes[n], reader.dtypes[n],
                         cut(reader.shapes[n], axis, weight.layer, recipe),
                         partial(reader.tensor, n)) for n in names]


def check_layout(recipe: Recipe) -> None:
    """Raises a ValueError, with the nearest possible layout, if model or batch cannot have the
    recipe's."""
    broken = list(rule_violations(recipe))
    if broken:
        near = _nearest(recipe)
        remedy = (
            ""
            if near is None
            else "; the nearest layout that the model allows is "
            + " ".join(f"parallel.{key}={str(value).lower()}" for key, value in near.items())
        )
        raise ValueError("; ".join(broken) + remedy)


def _nearest(recipe: Recipe) -> dict[str, int | bool] | None:
    """Allowed layout with the degrees nearest to a recipe's, by their ratios. None if there is
    none."""
    p, m = recipe.parallel, recipe.model
    wanted = (p.tensor, p.pipeline, p.interleave, p.data)
    stages = divisors(m.layers)
    best = None
    for degrees in itertools.product(m.tensor_degrees(), stages, stages,
                                     divisors(recipe.train.global_batch)):
        tensor, pipeline, interleave, data = degrees
        layout = {"tensor": tensor, "pipeline": pipeline, "interleave": interleave, "data": data,
                  "sequence": p.sequence and tensor > 1}
        distance = sum(abs(math.log(a / b)) for a, b in zip(degrees, wanted, strict=True))
        if best is not None and distance >= best[0]:
            continue
        if not list(
            rule_violations(recipe.model_copy(update={"parallel": p.model_copy(update=layout)}))
        ):
            best = distance, layout
    return best and best[1]
