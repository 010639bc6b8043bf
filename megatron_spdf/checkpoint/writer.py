"""Writes a `torch_dist` directory, Megatron-Core's format, from one process with one tensor in
memory.

The libraries that write this format want all tensors of a rank at once. `dist_checkpointing.load`
reads the result at any layout, like a checkpoint that an engine saved.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from tqdm import tqdm

from megatron_spdf.files import new_file, write_file
from megatron_spdf.recipe.recipe import Recipe

T = TypeVar("T")
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
           "common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class Shard:
    """Box of the tensor that `StoredTensor.read` gives, and the file that stores it."""

    file: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Tensor to write, or one layer of a tensor that has the layers along its first axis.

    Attributes:
        name, shape, dtype: of the whole tensor in the checkpoint.
        shards: boxes that together cover the result of `read`.
        read: returns the values; called once, when the tensor is written.
        layer: index along the first axis if `read` gives one layer; None if it gives the whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: tuple[Shard, ...]
    read: Callable[[], Tensor]
    layer: int | None = None


def write_tensors(directory: Path, tensors: Sequence[StoredTensor],
                  objects: Mapping[str, Any] | None = None,
                  common: Mapping[str, Any] | None = None) -> None:
    """Writes tensors and objects to an empty directory.

    Args:
        directory: to fill.
        tensors: in the order in which they are written.
        objects: name in the file -> object beside the tensors, pickled by `torch.save`.
        common: content of common.pt, plain values.
    """
    index, results = Metadata({}), []
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}

        def append(file: str, content: Any, place: MetadataIndex) -> None:
            if file not in files:
                files[file] = stack.enter_context(new_file(directory / file))
            # Through memory: an interrupt or a full disk inside torch.save would come out as
            # another error.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            start = files[file].tell()
            files[file].write(buffer.getbuffer())
            results.append(WriteResult(place, buffer.tell(),
                                       _StorageInfo(file, start, buffer.tell())))

        for name, value in (objects or {}).items():
            index.state_dict_metadata[name] = BytesStorageMetadata()
            append(file_name(0), value, MetadataIndex(name))
        for tensor in with_progress(tensors, len(tensors)):
            entry = index.state_dict_metadata.setdefault(tensor.name, TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), []))
            values = tensor.read()
            assert values.dtype == tensor.dtype, (tensor.name, values.dtype)
            for shard in tensor.shards:
                box = values[tuple(slice(start, start + length) for start, length
                                   in zip(shard.offset, shard.size, strict=True))]
                offset = torch.Size(shard.offset if tensor.layer is None
                                    else (tensor.layer, *shard.offset))
                box = box if tensor.layer is None else box[None]
                append(shard.file, box.clone(memory_format=torch.contiguous_format),
                       MetadataIndex(tensor.name, offset, len(entry.chunks)))
                entry.chunks.append(ChunkStorageMetadata(offset, box.size()))
    FileSystemWriter(directory).finish(index, [results])
    with new_file(directory / "common.pt") as file:
        torch.save(dict(common or {}), file)
    write_file(directory / "metadata.json", json.dumps(_FORMAT))


def with_progress(items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with a bar on standard error where that is a terminal."""
    return iter(tqdm(items, total=total, unit="tensor", dynamic_ncols=True, disable=None))


def file_name(rank: int) -> str:
    """Name of the file of one model-parallel rank."""
    return f"__{rank}_0.distcp"


def whole(shape: tuple[int, ...]) -> tuple[Shard, ...]:
    """The single shard of a tensor in one piece, in the first file."""
    return (Shard(file_name(0), (0,) * len(shape), shape),)


def cut(shape: tuple[int, ...], axis: int | None, layer: int, recipe: Recipe) -> tuple[Shard, ...]:
    """Shards of a tensor, one in the file of each model-parallel rank that holds it in a recipe's
    layout.

    Args:
        shape: of the tensor.
        axis: along which tensor parallelism cuts; None: the first rank of the pipeline stage writes
            it whole.
        layer: number of the transformer layer; -1 before the layers, `layers` after them.
        recipe: gives the layout.
    """
    first = _stage_of(layer, recipe) * recipe.parallel.tensor
    if axis is None:
        return (Shard(file_name(first), (0,) * len(shape), shape),)
    share = shape[axis] // recipe.parallel.tensor
    size = tuple(share if i == axis else n for i, n in enumerate(shape))
    return tuple(Shard(file_name(first + rank),
                       tuple(rank * share if i == axis else 0 for i in range(len(shape))), size)
                 for rank in range(recipe.parallel.tensor))


def _stage_of(layer: int, recipe: Recipe) -> int:
    """Pipeline rank that holds a layer. Interleaved stages go round the ranks."""
    stages, layers = recipe.parallel.pipeline, recipe.model.layers
    if layer in (-1, layers):
        return 0 if layer < 0 else stages - 1
    return layer // (layers // stages // recipe.parallel.interleave) % stages
