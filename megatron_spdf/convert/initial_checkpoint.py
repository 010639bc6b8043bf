"""Writes a run directory whose step 0 has given weights: of another format, or with other masks.

    OUT/recipe.yaml
    OUT/checkpoints/step_00000000/    weights, compact where the recipe is sparse; a fresh optimizer

`pretrain.py` with the same recipe resumes from it as from any checkpoint.

Shapes: S slices of a weight, A active entries of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.architecture.base import Weight
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.reader import (
    AGES,
    FIRST_BITS,
    HELD_BITS,
    MASK_BITS,
    OPTIMIZER,
    TRAINED_BITS,
    VALUES,
    stored_name,
)
from megatron_spdf.checkpoint.run_metadata import Masks, run_record, seeded_masks, stored_masks
from megatron_spdf.checkpoint.writer import StoredTensor, cut, write_tensors
from megatron_spdf.convert.calibration import CheckedText
from megatron_spdf.convert.source import WeightSource
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.files import atomic_directory, write_json
from megatron_spdf.kernels.mask import pack
from megatron_spdf.model.parametrization import Parametrization, unfold
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.recipe.load import save_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.largest import largest_bits, under_the_active
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.sparsity.selectors.base import SELECTORS, Inputs, Selector, TrainedWeight
from megatron_spdf.sparsity.selectors.magnitude import Magnitude
from megatron_spdf.sparsity.slices import join_slices, slice_of

if TYPE_CHECKING:  # it imports Megatron-Core, for which stand-ins may have to be installed
    from megatron_spdf.convert.layerwise_pruning import LayerwisePruning, Losses

RECIPE, CHECKPOINTS = "recipe.yaml", "checkpoints"  # as in runs/run_dir.py
_START = {"step": 0, "optimizer_steps": 0, "skipped": 0, "skipped_in_a_row": 0, "evaluated": 0,
          "best_step": 0, "best_loss": None, "worse": 0, "tokens": 0, "mask_updates": 0}
_MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Begun:
    """A run directory that was written.

    Attributes:
        plan: of the first stage.
        losses: before and after pruning, where text was given.
        zeros: share of the linear weights that was zero in the source.
    """

    plan: Plan
    losses: Losses | None
    zeros: float


def write_initial_checkpoint(source: WeightSource, recipe: Recipe, tokenizer: Tokenizer,
                             output: Path, select: str = "random",
                             text: CheckedText | None = None) -> Begun:
    """Writes the run directory, which appears complete or not at all, with one dense weight in
    memory, or one layer where text is given.

    Args:
        source: of the weights.
        recipe: of the run to come; its `output` is replaced.
        tokenizer: of the recipe's data.
        output: directory, which must not exist.
        select: name of the selector of the entries of a sparse weight that stay. Masks that the
            plan does not draw live in the run's checkpoints.
        text: that the selector looks at, and that losses are measured on.

    Raises:
        ValueError: the source has another shape or tokenizer than the recipe, or is damaged;
            `output` exists; the selector cannot serve the pattern, or needs text.
    """
    if source.model.vocab_size < tokenizer.vocab_size <= recipe.model.vocab_size:
        raise ValueError(f"{source.path} has {source.model.vocab_size} rows for tokens, and the "
                         f"tokenizer of the recipe's data {tokenizer.vocab_size} ids: it is "
                         "another than the model's. Preprocess the data with the model's tokenizer")
    check_shape(source, recipe)
    _check_tokenizer(source, tokenizer)
    selector = SELECTORS.get(select)()
    if selector.reads_levels:
        recipe = _with_levels(recipe, source, selector)
    begun = stages_of(recipe.model_copy(update={"output": str(output)}))[0]
    recipe, plan = begun.recipe, begun.plan
    check_selector(selector, recipe, plan, text)
    state = _FreshState(source, recipe, plan, selector)
    with atomic_directory(output) as directory, _layer_by_layer(state, text) as pruning:
        checkpoint = directory / CHECKPOINTS / store.name_of(0)
        checkpoint.mkdir(parents=True)
        write_tensors(checkpoint, state.tensors())
        losses = pruning.losses() if pruning else None
        tokenizer.save(checkpoint / "tokenizer")
        masks = _describe_masks(source, plan, selector, text)
        write_json(checkpoint / store.RUN, run_record(
            recipe, plan, tokenizer, masks, source.origin, _START, state.measured))
        finish_run(checkpoint, recipe.without_stages())
    return Begun(plan, losses, state.zeros / max(1, state.read))


def _with_levels(recipe: Recipe, source: WeightSource, selector: Selector) -> Recipe:
    """A recipe with the sparsity that a selector reads off the weights.

    Raises:
        ValueError: there are no masks, or the recipe cannot have them.
    """
    if recipe.stages:
        raise ValueError(f"select={selector.name} reads one sparsity off the weights, and the "
                         "recipe has stages of their own; leave out stages")
    sparsity = selector.levels(recipe.sparsity, recipe.model, source.weight)
    recipe = recipe.model_copy(update={"sparsity": sparsity})
    if broken := list(rule_violations(recipe)):
        raise ValueError("; ".join(broken))
    return recipe


def check_selector(selector: Selector, recipe: Recipe, plan: Plan,
                   text: CheckedText | None) -> None:
    """Requires that a selector can select the weights of a plan.

    Raises:
        ValueError: the pattern has no such masks, no weight is sparse at the beginning, or there is
            no text to look at.
    """
    for weight in plan.weights.values():
        selector.check(weight)
    if not plan.weights and not selector.seeded:
        sparsity = recipe.sparsity
        raise ValueError(f"select={selector.name} has nothing to select: sparsity.level="
                         f"{sparsity.level:g} with algorithm={sparsity.algorithm} begins with "
                         f"dense weights; set {sparsity.update.to_begin_sparse or 'a level'}, or "
                         "leave out --select")
    if selector.calibrated and (text is None or text.calibrate is None):
        raise ValueError(f"select={selector.name} looks at the inputs of weights; give "
                         "--calibration PREFIX, a data set of the model's tokenizer")


def finish_run(checkpoint: Path, recipe: Recipe) -> None:
    """Writes the list of a new checkpoint's files, and the recipe of its run directory."""
    write_json(checkpoint / store.FILES, {name: store.describe(checkpoint / name)
                                          for name in store.files_of(checkpoint)})
    save_recipe(recipe, checkpoint.parents[1] / RECIPE)


def check_shape(source: WeightSource, recipe: Recipe) -> None:
    """Raises a ValueError, naming both values of each difference, if the recipe's model has another
    shape."""
    differ = [f"model.{key} is {there} there and {here} in the recipe"
              for key, (there, here) in source.model.differences(recipe.model).items()]
    if differ:
        raise ValueError(f"{source.path} is another model than the recipe's: {'; '.join(differ)}. "
                         "Set these to what is there, as section.key=value or in the recipe")


def _check_tokenizer(source: WeightSource, tokenizer: Tokenizer) -> None:
    theirs = source.tokenizer
    if theirs and theirs.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{source.path} has the tokenizer {theirs.sha256} ({theirs.kind}, {theirs.vocab_size} "
            f"tokens), and the recipe's data were made with {tokenizer.sha256} ({tokenizer.kind}, "
            f"{tokenizer.vocab_size} tokens) (sha256 of the files). Preprocess the data with the "
            "model's tokenizer; if the two only differ in how their files are written, remove the "
            "tokenizer's files from a copy of the model")


def _describe_masks(source: WeightSource, plan: Plan, selector: Selector,
                    text: CheckedText | None) -> Masks:
    if selector.seeded or not plan.weights:
        return seeded_masks(plan)
    seen = text.said if text and selector.calibrated else ""
    return stored_masks(f"{selector.how} of {source.origin}{seen}")


@contextmanager
def _layer_by_layer(state: _FreshState, text: CheckedText | None
                    ) -> Iterator[LayerwisePruning | None]:
    """Selects a state's weights layer by layer while it is entered, where there is text."""
    if text is None:
        yield None
        return
    from megatron_spdf.parallel import fake_cuda

    fake_cuda.install()  # before anything that imports megatron.core
    from megatron_spdf.convert.layerwise_pruning import LayerwisePruning, single_process

    with single_process(state.recipe) as device:
        state.pruning = LayerwisePruning(state.source, state.recipe, state.plan, state.selector,
                                         state.choose, text, device)
        yield state.pruning


class _FreshState:
    """Tensors of a checkpoint at step 0.

    Attributes:
        measured: canonical name of a sparse weight -> fraction of zeros, for weights read so far.
        zeros, read: entries of linear weights that are zero in the source, and all that were read.
        pruning: selects layer by layer; None: each weight is selected by itself.
    """

    def __init__(self, source: WeightSource, recipe: Recipe, plan: Plan, selector: Selector):
        self.source, self.recipe, self.plan, self.selector = source, recipe, plan, selector
        self.pruning: LayerwisePruning | None = None
        self.rules = Parametrization(recipe, plan)
        self.dtype = _MODEL_DTYPES[recipe.train.precision]
        self.measured: dict[str, float] = {}
        self.zeros = self.read = 0
        self._counted: set[str] = set()
        self._last: tuple[str, Tensor, Tensor] | None = None

    def tensors(self) -> list[StoredTensor]:
        """All tensors, grouped by parameter, so that each parameter is read and cut to its mask
        once."""
        return [tensor for weight in self.source.weights.values() for tensor in self._of(weight)]

    def _of(self, weight: Weight) -> list[StoredTensor]:
        name, sparse = stored_name(weight.name), self.plan.weights.get(weight.name)
        shape, axis, tensors = weight.shape, weight.axis, []
        if sparse:
            shape, axis = (sparse.slices, sparse.stored_per_slice), 0
            tensors, name = self._beside(weight, sparse), name + VALUES
        values = partial(self._values, weight.name)
        tensors.append(self._stored(name, shape, axis, weight, self.dtype,
                                    lambda: values().to(self.dtype)))
        for state in self.recipe.saved:
            read = values if state == MASTER else lambda: torch.zeros(shape)
            tensors.append(self._stored(f"{OPTIMIZER}{state}.{name}", shape, axis, weight,
                                        torch.float32, read))
        return tensors

    def _beside(self, weight: Weight, planned: SparseWeight) -> list[StoredTensor]:
        """What lies beside the values of a sparse weight: its mask, and what its algorithm keeps of
        its own."""
        algorithm = planned.algorithm
        entries, active = math.prod(planned.slice_shape), planned.active_per_slice

        def mask() -> Tensor:
            return self._compact(weight.name)[1]

        def zeros() -> Tensor:
            return pack(self._compact(weight.name)[0] == 0)

        kinds = [(MASK_BITS, math.ceil(entries / 8), mask, True),
                 (FIRST_BITS, math.ceil(entries / 8), mask, algorithm.tracks),
                 (AGES, active, None, algorithm.tracks_ages),
                 (HELD_BITS, math.ceil(active / 8), zeros if algorithm.stays else None,
                  algorithm.holds),
                 (TRAINED_BITS, math.ceil(entries / 8), partial(self._trained_bits, planned),
                  planned.trains_some)]
        return [self._bytes(stored_name(weight.name) + kind, (planned.slices, width), weight, read)
                for kind, width, read, there in kinds if there]

    def _bytes(self, name: str, shape: tuple[int, int], weight: Weight,
               read: Callable[[], Tensor] | None) -> StoredTensor:
        """Bytes of slices (S, bytes); None: zeros."""
        return self._stored(name, shape, 0, weight, torch.uint8,
                            read or (lambda: torch.zeros(shape, dtype=torch.uint8)))

    def _stored(self, name: str, shape: tuple[int, ...], axis: int | None, weight: Weight,
                dtype: torch.dtype, read: Callable[[], Tensor]) -> StoredTensor:
        return StoredTensor(name, shape, dtype, cut(shape, axis, weight.layer, self.recipe), read)

    def _values(self, name: str) -> Tensor:
        """Values that the model keeps of a parameter, float32: all of them, or the active ones (S,
        A)."""
        return self._compact(name)[0] if name in self.plan.weights else self._master(name)

    def _master(self, name: str) -> Tensor:
        """Dense weight in the parametrization of the recipe."""
        return unfold(self._given(name), self.rules.folded(name))

    def _given(self, name: str) -> Tensor:
        """Dense weight of the source, float32. Zeros of linear ones are counted."""
        weight = self.source.master(name)
        if self.source.weights[name].linear and name not in self._counted:
            self._counted.add(name)
            self.zeros += weight.numel() - int(weight.count_nonzero())
            self.read += weight.numel()
        return weight

    def _compact(self, name: str) -> tuple[Tensor, Tensor]:
        """Active values (S, A) and mask bits (S, bytes) of a sparse weight. The last result is
        kept."""
        if self._last is None or self._last[0] != name:
            self._last = (name, *self._select(name))
        return self._last[1:]

    def _trained_bits(self, planned: SparseWeight) -> Tensor:
        """The entries that get a gradient until masks are chosen anew, (S, bytes)."""
        return largest_bits(self._compact(planned.name)[0], planned.trained_per_slice)

    def _select(self, name: str) -> tuple[Tensor, Tensor]:
        """Cuts a weight to its mask, slice by slice, and measures its sparsity."""
        planned = self.plan.weights[name]
        values, masks = (self.pruning.of(name) if self.pruning
                         else self.choose(name, self._given(name), None))
        dense, stored, active = unfold(values, self.rules.folded(name)), [], 0
        for number, mask in enumerate(masks):
            entries = slice_of(dense, planned, number).numpy()
            if not planned.algorithm.keeps:
                stored.append(entries[mask])
            else:  # which choose the largest from the next step on
                stored.append(under_the_active(entries, mask) if self.selector.calibrated
                              else entries)
            active += np.count_nonzero(entries[mask])
        self.measured[name] = 1.0 - active / planned.numel
        return torch.from_numpy(np.stack(stored)), torch.from_numpy(np.packbits(masks, axis=1))

    def choose(self, name: str, dense: Tensor, inputs: Inputs | None) -> tuple[Tensor, np.ndarray]:
        """Selects the entries of a weight: by inputs as the standard model has it, and else in the
        parametrization of the recipe.

        Args:
            dense: (out, in) float32, of the standard model.

        Returns:
            Dense values of the standard model, and masks (slices, entries) bool.
        """
        planned = self.plan.weights[name]
        keeps = planned.algorithm.keeps
        # weights that keep all entries choose the largest themselves, unless inputs say otherwise
        selector = Magnitude() if keeps and not self.selector.calibrated else self.selector
        own = dense if selector.calibrated else unfold(dense, self.rules.folded(name))
        matrices = self.source.model.matrix_of_rows(self.source.weights[name]).numpy()
        values, masks = selector.select(
            TrainedWeight(own, planned, self.plan.seed, matrices, inputs))
        values = values if selector.calibrated else dense
        if keeps:  # what has died has its value in the parameter
            values = values.where(join_slices(torch.from_numpy(masks), planned).to(values.device),
                                  dense)
        active = masks.sum(1)
        assert (active == planned.active_per_slice).all(), (name, self.selector.name, active)
        assert planned.fault(masks) is None, (name, self.selector.name)
        return values, masks
