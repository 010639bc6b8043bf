"""Reads the weights of this project's models in DeepSpeed's own checkpoints.

ZeRO 0 to 3 and tensor parallelism are supported, in the format of DeepSpeed 0.19.8:

    DIR/latest                                                     tag of the newest checkpoint
    DIR/TAG/mp_rank_00_model_states.pt                   weights, names and shapes; one per mp rank
    DIR/TAG/zero_pp_rank_0_mp_rank_00_model_states.pt    the same under ZeRO-3, one per dp rank too
    DIR/TAG/[bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt  flat fp32 partitions, one per rank

mp is the tensor-parallel rank, and dp (pp in the files' names) the data-parallel one. Where the
optimizer was sharded, the weights are in the flat fp32 partitions, in the layout of `param_shapes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_spdf.architecture.base import HEAD, Model, Weight
from megatron_spdf.convert.foreign import place_of, read_pickled, read_word, require_finite
from megatron_spdf.paths import real
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.slices import join_slices
from megatron_spdf.text import first_line, printable

T = TypeVar("T")
LATEST = "latest"
# of a sparse weight
_VALUES, _MASK = "parametrizations.weight.original", "parametrizations.weight.0.mask_bits"
_MODEL = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


# Classes whose objects may stand beside tensors and plain values. They are not made.
_ALLOWED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
_REMEDY = ("it must be a file of DeepSpeedEngine.save_checkpoint without a client_state of other "
           "than plain values")


class DeepSpeedReader:
    """Weights of a checkpoint of `DeepSpeedEngine.save_checkpoint`, as a `source.WeightSource`.

    No pickled code is run. The files do not hold the model's shape, which comes from a recipe.

    Args:
        path: directory with `latest`, or one checkpoint in it.
        model: shape that the weights must have.

    Raises:
        ValueError: it is no such checkpoint, lacks files of some ranks, holds objects that could
            run code, or is of another model.
    """

    tokenizer = None

    def __init__(self, path: Path, model: Model):
        self.path, self.model = find_checkpoint(path), model
        self.weights: dict[str, Weight] = {w.name: w for w in model.weights()}
        with _sound(self.path):
            self._ranks = [_Rank(states, shards) for states, shards in _files_by_rank(self.path)]
            self._check()

    @property
    def origin(self) -> str:
        """Origin of the weights, in words."""
        return f"the DeepSpeed checkpoint {'/'.join(real(self.path).parts[-2:])}"

    def weight(self, name: str) -> Tensor:
        """Whole dense parameter by its canonical name, in float32 if the optimizer was sharded."""
        with _sound(self.path):
            return require_finite(self._weight(name), name, self.path)

    def _weight(self, name: str) -> Tensor:
        weight, compact = self.weights[name], _compact_name(name)
        if compact in self._ranks[0].shapes:
            return self._expanded(weight, compact)
        shards = [rank.tensor(name) for rank in self._ranks]
        return shards[0].clone() if weight.axis is None else torch.cat(shards, weight.axis)

    def master(self, name: str) -> Tensor:
        """Parameter as `weight` gives it, in float32."""
        return self.weight(name).float()

    def _expanded(self, weight: Weight, compact: str) -> Tensor:
        """Dense weight of the compact values (slices, active per slice) and their mask."""
        values = torch.cat([rank.tensor(compact) for rank in self._ranks])  # (slices, active)
        bits = torch.cat([rank.buffers[compact.replace(_VALUES, _MASK)] for rank in self._ranks])
        planned = SparseWeight(weight.name, weight.shape, weight.axis, len(values), 0.0)
        active = np.unpackbits(bits.numpy(), axis=1,
                               count=math.prod(planned.slice_shape)).astype(bool)
        if (active.sum(axis=1) != values.shape[1]).any():
            raise ValueError(f"{self.path}: {weight.name} has {values.shape[1]} values in each "
                             "slice, another number than of active entries in its mask; the "
                             "checkpoint is damaged")
        slices = torch.zeros(active.shape, dtype=values.dtype)
        slices[torch.from_numpy(active)] = values.flatten()
        return join_slices(slices, planned)

    def _check(self) -> None:
        """Raises a ValueError unless the files hold every weight of the model, in its shape, and no
        other."""
        tp = len(self._ranks)
        expected = {}
        for name, weight in self.weights.items():
            compact = _compact_name(name)
            sparse = compact in self._ranks[0].shapes
            expected[compact if sparse else name] = None if sparse else tuple(
                n // tp if i == weight.axis else n for i, n in enumerate(weight.shape))
        for rank in self._ranks:
            missing = [name for name in expected if name not in rank.shapes]
            wrong = [f"{name} is {rank.shapes[name]} there and {shape} in the recipe's model"
                     for name, shape in expected.items() if shape and rank.shapes.get(name, shape)
                     != shape]
            unknown = [name for name in rank.shapes if name not in expected and name != HEAD]
            if missing or wrong or unknown:
                found = [*(f"it has no {name}" for name in missing), *wrong,
                         *(f"it has {printable(n[:100])} too" for n in unknown)]
                raise ValueError(f"{self.path} is another model than the recipe's, cut for {tp} "
                                 f"tensor-parallel ranks: {'; '.join(found[:4])}. Set the recipe's "
                                 "model section to what is there")


class _Rank:
    """Part of one tensor-parallel rank: its parameters by name, cut out of flat partitions if
    sharded."""

    def __init__(self, states: Path, shards: list[Path]):
        state = _load(states)
        module = _of(dict, state.get("module"), states, "module")
        self._module = {_of(str, name, states, "name"): value for name, value in module.items()
                        if isinstance(value, Tensor)}
        self.buffers = {name: self._module[name] for name in state["buffer_names"]}
        self._groups: list[dict[str, Any]] = state["param_shapes"] or []
        self._partitions = [_of(dict, _load(path).get("optimizer_state_dict"), path,
                                "optimizer_state_dict") for path in shards]
        if self._groups:
            self.shapes = {name: _shape_in(shape)
                           for group in self._groups for name, shape in group.items()}
        else:  # nothing was sharded
            self.shapes = {n: tuple(t.shape) for n, t in self._module.items()
                           if n not in self.buffers}

    def tensor(self, name: str) -> Tensor:
        """Parameter of this rank by its name in the file."""
        if not self._groups:
            return self._module[name]
        numel, shape = math.prod(self.shapes[name]), self.shapes[name]
        pieces = (
            self._zero3_pieces(name)
            if "fp32_flat_groups" in self._partitions[0]
            else self._zero1_pieces(name)
        )
        return torch.cat(list(pieces))[:numel].view(shape)

    def _zero1_pieces(self, name: str) -> Iterator[Tensor]:
        """Pieces of a parameter under ZeRO-1 and 2, which cut a group of parameters, as one flat
        vector, evenly among the ranks."""
        group, start = self._places[name]
        end = start + math.prod(self.shapes[name])
        offset = 0
        for partition in self._partitions:
            part = partition["single_partition_of_fp32_groups"][group]
            low, high = max(start, offset), min(end, offset + part.numel())
            if low < high:
                yield part[low - offset : high - offset]
            offset += part.numel()

    def _zero3_pieces(self, name: str) -> Iterator[Tensor]:
        """Pieces of a parameter under ZeRO-3, which cuts every parameter evenly among the ranks.
        The pieces of one rank form one vector."""
        size = -(-math.prod(self.shapes[name]) // len(self._partitions))
        start = self._zero3_places[name]
        for flat in self._flats:
            yield flat[start : start + size]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Name -> number of its group and offset in it."""
        paddings = self._partitions[0].get("param_alignment_paddings")
        places = {}
        for number, group in enumerate(self._groups):
            offset = 0
            for position, (name, shape) in enumerate(group.items()):
                places[name] = (number, offset)
                offset += math.prod(shape) + (paddings[number][position] if paddings else 0)
        return places

    @cached_property
    def _zero3_places(self) -> dict[str, int]:
        """Name -> offset in every rank's vector."""
        places, offset = {}, 0
        for name, shape in self.shapes.items():
            places[name] = offset
            offset += -(-math.prod(shape) // len(self._partitions))
        return places

    @cached_property
    def _flats(self) -> list[Tensor]:
        return [torch.cat(list(partition["fp32_flat_groups"])) for partition in self._partitions]


def find_checkpoint(path: Path) -> Path:
    """Finds the newest checkpoint of a DeepSpeed directory, or returns `path` if it is a
    checkpoint.

    Raises:
        ValueError: it is neither.
    """
    if any(path.glob("*_model_states.pt")):
        return path
    latest = path / LATEST
    place = place_of(path, read_word(latest), latest) if latest.is_file() else path
    if not any(place.glob("*_model_states.pt")):
        raise ValueError(f"{path} is no checkpoint of DeepSpeed: it has neither *_model_states.pt "
                         f"nor a file {LATEST} that names a directory with such files")
    return place


def _files_by_rank(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yields model states of every tensor-parallel rank, with its optimizer states by data-parallel
    rank.

    Raises:
        ValueError: files of some ranks are missing.
    """
    files = [place_of(path, file.name, path) for file in path.glob("*_states.pt")]
    states = {int(found[1]): file for file in files if (found := _MODEL.fullmatch(file.name))}
    shards = {(int(found[2]), int(found[1])): file for file in files
              if (found := _OPTIMIZER.fullmatch(file.name))}
    replicas = {dp for _, dp in shards}
    wanted = {(tp, dp) for tp in range(len(states)) for dp in range(len(replicas))}
    if sorted(states) != list(range(len(states))) or shards.keys() != wanted:
        raise ValueError(f"{path} lacks files of some ranks: model states of mp ranks "
                         f"{sorted(states)}, optimizer states of (mp, dp) ranks {sorted(shards)}; "
                         "copy all of them to one place")
    for tp, file in sorted(states.items()):
        world = _load(file).get("dp_world_size", 1)
        if replicas and len(replicas) != world:
            raise ValueError(f"{path} has the optimizer states of {len(replicas)} of {world} "
                             "data-parallel ranks; copy all of them to one place")
        yield file, [shards[tp, dp] for dp in sorted(replicas)]


def _load(path: Path) -> dict[str, Any]:
    return _of(dict, read_pickled(path, _REMEDY, _ALLOWED), path, "a dictionary")


def _of(kind: type[T], value: Any, path: Path, what: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{path} has no {what} where DeepSpeed has it; {_REMEDY}")
    return value


def _shape_in(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError("a shape is no shape")
    return shape


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Names the checkpoint in whose files something is not what DeepSpeed writes."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its files are not as DeepSpeed writes them "
                         f"({type(error).__name__}: {printable(first_line(error))}); copy "
                         "them again") from None


def _compact_name(name: str) -> str:
    return name.removesuffix("weight") + _VALUES
