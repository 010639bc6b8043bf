"""Reads a checkpoint in one process, tensor by tensor: no ranks, no GPU, no engine."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.vet import vet_metadata
from megatron_spdf.config import Recipe
from megatron_spdf.model.weights import Weight, model_weights
from megatron_spdf.sparsity.plan import SparseWeight, make_plan

VALUES, MASK_BITS = ".values", ".mask_bits"  # after the name of a sparse weight
# Megatron-Core saves a block's norms as part of the layer they feed, where Transformer Engine fuses them.
_STORED = {".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
           ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_"}
_RUN_KEYS = {"state", "tokens", "recipe", "tokenizer", "sparsity", "versions", "saved"}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, or of the run that it is the best one, where the run keeps it, else the newest.

    Raises:
        ValueError: it is neither, or no save of the run has finished.
    """
    if path.name.endswith(store.PARTIAL):
        raise ValueError(f"{path} is a save that did not finish; use a complete checkpoint, without {store.PARTIAL}")
    if (path / store.RUN).is_file() or (path / store.FILES).is_file():
        return path
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{path} is neither a checkpoint (it has no {store.RUN}) nor a run directory (it has no "
                         "checkpoints/); give one of these, such as runs/mine or runs/mine/checkpoints/step_00000500")
    found = store.visible(path / "checkpoints")
    if not found:
        raise ValueError(f"the run {path} has no complete checkpoint; start it again to make one")
    return store.best(path / "checkpoints") or found[-1]


def stored_name(name: str) -> str:
    """The name in the file of the parameter with this canonical name."""
    for canonical, stored in _STORED.items():
        name = name.replace(canonical, stored)
    return name


class CheckpointReader:
    """A checkpoint directory, vetted.

    Args:
        path: of the checkpoint itself, see `find_checkpoint`.
        checksums: also read every byte of every file first, not their sizes alone.

    Attributes:
        run: the content of run.json.
        recipe: what the checkpoint was made with.
        plan: the sparsity plan of that recipe.
        weights: canonical name -> parameter of the whole model.
        shapes, dtypes: of every tensor by its name in the file, weights and optimizer state alike.

    Raises:
        DamagedCheckpoint: files are missing, or have another size or content than was written.
        ValueError: run.json cannot be understood, or the index is none or holds code.
    """

    def __init__(self, path: Path, checksums: bool = False):
        store.verify(path, checksums)
        vet_metadata(path)
        self.path = path
        self.run, self.recipe = _read_run(path / store.RUN)
        model = self.recipe.model
        self.weights: dict[str, Weight] = {w.name: w for w in model_weights(model)}
        self.plan = make_plan(self.recipe.sparsity, list(self.weights.values()), model.query_groups)
        self._storage = _Storage(path)
        tensors = self._storage.read_metadata().state_dict_metadata.items()
        self._tensors = {name: entry for name, entry in tensors if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {name: tuple(entry.size) for name, entry in self._tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in self._tensors.items()}

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's values."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def tensor(self, name: str) -> Tensor:
        """A whole tensor by its name in the file, on CPU, in the type it was saved in.

        Raises:
            DamagedCheckpoint: it is missing, has gaps, or cannot be read.
        """
        if name not in self._tensors:
            raise store.DamagedCheckpoint(f"checkpoint {self.path} has no tensor {name}; use another checkpoint")
        held = sum(math.prod(chunk.sizes) for chunk in self._tensors[name].chunks)
        if held != math.prod(self.shapes[name]):
            raise store.DamagedCheckpoint(f"checkpoint {self.path} holds {held} of the {math.prod(self.shapes[name])} "
                                          f"numbers of {name}; use another checkpoint")
        state = {name: torch.empty(self.shapes[name], dtype=self.dtypes[name])}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it reads in a single process
                load(state, storage_reader=self._storage, no_dist=True)
        except CheckpointException as error:
            raise store.DamagedCheckpoint(f"checkpoint {self.path}: {name} cannot be read ({error}); use another "
                                          "checkpoint") from None
        return state[name]

    def mask_bits(self, name: str) -> np.ndarray:
        """The mask of a sparse weight as it is saved, (chunks, ceil(entries per chunk / 8)) uint8.

        Raises:
            DamagedCheckpoint: it is missing, or has another shape than planned.
        """
        planned = self.plan.weights[name]
        shape = (planned.chunks, math.ceil(math.prod(planned.chunk_shape) / 8))
        return self._of_shape(stored_name(name) + MASK_BITS, shape).numpy()

    def weight(self, name: str) -> Tensor:
        """A parameter by its canonical name, whole and dense: of a sparse weight, values at their places in zeros.

        Raises:
            DamagedCheckpoint: it is missing, has another shape than the model's, or a mask of another density.
        """
        planned = self.plan.weights.get(name)
        if planned is None:
            return self._of_shape(stored_name(name), self.weights[name].shape)
        values = self._of_shape(stored_name(name) + VALUES, (planned.chunks, planned.active_per_chunk))
        active = np.unpackbits(self.mask_bits(name), axis=1, count=math.prod(planned.chunk_shape))
        counts = active.sum(axis=1, dtype=np.int64)
        if (counts != planned.active_per_chunk).any():
            raise store.DamagedCheckpoint(
                f"checkpoint {self.path}: the chunks of {name} have {counts.tolist()} active entries instead of "
                f"{planned.active_per_chunk} each; use another checkpoint")
        return _expand(values, torch.from_numpy(active).bool(), planned)

    def _of_shape(self, stored: str, shape: tuple[int, ...]) -> Tensor:
        if self.shapes.get(stored, shape) != shape:
            raise store.DamagedCheckpoint(f"checkpoint {self.path}: {stored} has shape {self.shapes[stored]} instead "
                                          f"of {shape}; use another checkpoint")
        return self.tensor(stored)


class _Storage(FileSystemReader):
    """Reads the index once, and not again for every tensor."""

    _index: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self._index = self._index or super().read_metadata()
        return self._index


def _expand(values: Tensor, active: Tensor, planned: SparseWeight) -> Tensor:
    """Dense weight (out, in) from values (C, k) and mask (C, entries per chunk), chunk after chunk."""
    chunks = torch.zeros(active.shape, dtype=values.dtype)
    chunks[active] = values.flatten()
    chunks = chunks.view(planned.chunks, *planned.chunk_shape)
    return torch.cat(list(chunks), dim=planned.axis)


def _read_run(path: Path) -> tuple[dict[str, Any], Recipe]:
    try:
        run = json.loads(path.read_text())
        missing = _RUN_KEYS - run.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return run, Recipe.model_validate(run["recipe"])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a run: {error}. Use a checkpoint that this program wrote, or the "
                         "version of this program that wrote it") from None
