"""Reads a checkpoint in one process, tensor by tensor: no ranks, no GPU, no engine."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.architecture.base import Weight
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.run_metadata import Masks, read_run_record, seeded_masks
from megatron_spdf.checkpoint.tensors import TensorFiles
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_spdf.model.parametrization import Parametrization, fold
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.sparsity.slices import join_slices

# after the name of a sparse weight
VALUES, MASK_BITS, FIRST_BITS, AGES = ".values", ".mask_bits", ".first_bits", ".ages"
HELD_BITS, TRAINED_BITS = ".held_bits", ".trained_bits"
OPTIMIZER = "optimizer.state."  # before the name of a state and that of a parameter
# Megatron-Core saves the two norms of a transformer layer as part of the linear layer that they
# feed, as Transformer Engine fuses them.
_STORED = {".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
           ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_"}


def find_checkpoint(path: Path, newest: bool = False) -> Path:
    """Finds the checkpoint of a path: itself, or that of a run directory.

    Of a run it is the best one, if the run keeps that, else the newest.

    Args:
        path: checkpoint or run directory.
        newest: of a run, always take the newest, from which the run goes on.

    Raises:
        ValueError: `path` is neither, or no save of the run has finished.
    """
    if path.name.endswith(store.PARTIAL):
        raise ValueError(f"{path} is a save that did not finish; use a complete checkpoint, "
                         f"without {store.PARTIAL}")
    if (path / store.RUN).is_file() or (path / store.FILES).is_file():
        return path
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{path} is neither a checkpoint (it has no {store.RUN}) nor a run "
                         "directory (it has no checkpoints/); give one of these, such as runs/mine "
                         "or runs/mine/checkpoints/step_00000500")
    found = store.visible(path / "checkpoints")
    if not found:
        raise ValueError(f"the run {path} has no complete checkpoint; start it again to make one")
    return found[-1] if newest else store.best(path / "checkpoints") or found[-1]


def stored_name(name: str) -> str:
    """Name in the file of the parameter with this canonical name."""
    for canonical, stored in _STORED.items():
        name = name.replace(canonical, stored)
    return name


class CheckpointReader(TensorFiles):
    """Checkpoint directory, vetted, as a `source.WeightSource`.

    Args:
        path: of the checkpoint itself, see `find_checkpoint`.
        checksums: also read every byte of every file first, instead of checking sizes alone.

    Attributes:
        run: content of run.json.
        recipe, model: that the checkpoint was made with.
        plan: sparsity plan of that recipe.
        rules: multipliers of the recipe's parametrization.
        masks: origin of its masks.
        weights: canonical name -> parameter of the whole model.
        shapes, dtypes: of every tensor by its name in the file, weights and optimizer state alike.

    Raises:
        DamagedCheckpoint: files are missing, or have another size or content than was written.
        ValueError: run.json cannot be understood, or the index is missing or holds code.
    """

    def __init__(self, path: Path, checksums: bool = False):
        # What is small goes first: it says how large the rest may be.
        names = store.files_of(path)
        store.verify(path, checksums, [name for name in names if not store.holds_tensors(name)])
        super().__init__(path)
        self.run = read_run_record(path / store.RUN)
        self.recipe = Recipe.model_validate(self.run["recipe"])
        self.model = self.recipe.model
        self.weights: dict[str, Weight] = {w.name: w for w in self.model.weights()}
        self.plan = Plan.of(self.recipe)
        self.rules = Parametrization(self.recipe, self.plan)
        self.masks: Masks = self.run.get("masks", seeded_masks(self.plan))
        if checksums:
            store.verify(path, names=[name for name in names if store.holds_tensors(name)])

    @property
    def origin(self) -> str:
        """Origin of the weights, in words."""
        return f"step {self.run['state']['step']:,} of the run {Path(self.recipe.output).name}"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that was saved with the checkpoint."""
        return load_tokenizer(self.path / "tokenizer")

    def side_bits(self, name: str) -> list[str]:
        """Names in the file of what lies beside a sparse weight's values: its mask, and
        what its algorithm keeps of its own."""
        planned, stored = self.plan.weights[name], stored_name(name)
        algorithm = planned.algorithm
        own = {HELD_BITS: algorithm.holds, TRAINED_BITS: planned.trains_some,
               FIRST_BITS: algorithm.tracks, AGES: algorithm.tracks_ages}
        return [stored + MASK_BITS, *(stored + bits for bits, there in own.items() if there)]

    def mask_bits(self, name: str) -> np.ndarray:
        """Mask of a sparse weight as it is saved, (slices, ceil(entries per slice / 8)) uint8.

        Raises:
            DamagedCheckpoint: it is missing, or has another shape than planned.
        """
        return self._bits(name, MASK_BITS)

    def held_bits(self, name: str) -> np.ndarray:
        """Active entries that are held at zero, (slices, ceil(active per slice / 8)) uint8;
        of algorithms that hold some."""
        planned = self.plan.weights[name]
        shape = (planned.slices, math.ceil(planned.active_per_slice / 8))
        return self._of_shape(stored_name(name) + HELD_BITS, shape).numpy()

    def active(self) -> int:
        """Number of entries of all sparse weights that are active and not held."""
        held = sum(int(np.unpackbits(self.held_bits(name), axis=1, count=w.active_per_slice)
                       .sum(dtype=np.int64))
                   for name, w in self.plan.weights.items() if w.algorithm.holds)
        return self.plan.active - held

    def first_bits(self, name: str) -> np.ndarray:
        """The mask at the beginning of the stage, as `mask_bits`; of algorithms that track it."""
        return self._bits(name, FIRST_BITS)

    def _bits(self, name: str, kind: str) -> np.ndarray:
        planned = self.plan.weights[name]
        shape = (planned.slices, math.ceil(math.prod(planned.slice_shape) / 8))
        return self._of_shape(stored_name(name) + kind, shape).numpy()

    def weight(self, name: str) -> Tensor:
        """Whole dense parameter by its canonical name. Masked entries of a sparse weight are zero.

        It is the weight of a standard model: the multipliers of the run's parametrization are
        folded in.

        Raises:
            DamagedCheckpoint: it is missing, has another shape than the model's, or a mask of
                another density.
        """
        return fold(self._dense(name, stored_name(name)), self.rules.folded(name))

    def master(self, name: str) -> Tensor:
        """Parameter as `weight` gives it, but in float32 from the optimizer's master weights."""
        return fold(self.parameter(name), self.rules.folded(name))

    def parameter(self, name: str) -> Tensor:
        """Parameter as `master` gives it, but without the multipliers of the run's
        parametrization."""
        return self.state(name, MASTER)

    def state(self, name: str, state: str) -> Tensor:
        """One fp32 state of the optimizer for a whole dense parameter; zero where it is masked.

        Args:
            state: `MASTER`, or one that the recipe's optimizer names.
        """
        return self._dense(name, f"{OPTIMIZER}{state}.{stored_name(name)}")

    def entries(self, name: str, state: str) -> Tensor:
        """One fp32 state of the optimizer for all entries that the parameter of a weight stores, as
        a whole dense weight: where a mask algorithm keeps those that are masked, they are there.

        Args:
            state: see `state`.
        """
        planned, stored = self.plan.weights.get(name), f"{OPTIMIZER}{state}.{stored_name(name)}"
        if planned is None or not planned.algorithm.keeps:
            return self._dense(name, stored)
        return join_slices(self._values(stored, planned), planned)

    def _values(self, stored: str, planned: SparseWeight) -> Tensor:
        return self._of_shape(stored + VALUES, (planned.slices, planned.stored_per_slice))

    def _dense(self, name: str, stored: str) -> Tensor:
        planned = self.plan.weights.get(name)
        if planned is None:
            return self._of_shape(stored, self.weights[name].shape)
        values = self._values(stored, planned)
        active = np.unpackbits(self.mask_bits(name), axis=1, count=math.prod(planned.slice_shape))
        counts = active.sum(axis=1, dtype=np.int64)
        if (counts != planned.active_per_slice).any():
            raise store.DamagedCheckpoint(
                f"checkpoint {self.path}: the slices of {name} have {counts.tolist()} active "
                f"entries instead of {planned.active_per_slice} each; use another checkpoint")
        mask = torch.from_numpy(active).bool()
        if planned.algorithm.keeps:
            return join_slices(values.where(mask, 0), planned)
        slices = torch.zeros(active.shape, dtype=values.dtype)
        slices[mask] = values.flatten()
        return join_slices(slices, planned)

    def _of_shape(self, stored: str, shape: tuple[int, ...]) -> Tensor:
        if self.shapes.get(stored, shape) != shape:
            raise store.DamagedCheckpoint(f"checkpoint {self.path}: {stored} has shape "
                                          f"{self.shapes[stored]} instead of {shape}; use another "
                                          "checkpoint")
        return self.tensor(stored)
