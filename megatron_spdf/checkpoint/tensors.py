"""Reads the tensors of a `torch_dist` directory, Megatron-Core's format, one at a time in one
process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_spdf.checkpoint.safe_index import vet_metadata
from megatron_spdf.checkpoint.store import DamagedCheckpoint


class TensorFiles:
    """`torch_dist` directory whose index has been vetted. Objects beside the tensors are never
    read.

    Attributes:
        shapes, dtypes: of every tensor by its name in the file.

    Raises:
        ValueError: the index is missing, or holds code.
    """

    def __init__(self, path: Path):
        vet_metadata(path)
        self.path = path
        self._storage = _Storage(path)
        entries = self._storage.read_metadata().state_dict_metadata.items()
        self._tensors = {name: entry for name, entry in entries
                         if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {name: tuple(entry.size) for name, entry in self._tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in self._tensors.items()}

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's values."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def tensor(self, name: str) -> Tensor:
        """Reads a whole tensor by its name in the file, to CPU, in the dtype it was saved in.

        Raises:
            DamagedCheckpoint: it is missing, has gaps, or cannot be read.
        """
        if name not in self._tensors:
            raise DamagedCheckpoint(f"checkpoint {self.path} has no tensor {name}; use another "
                                    "checkpoint")
        return self.part(name, (0,) * len(self.shapes[name]), self.shapes[name])

    def part(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """Reads a box of a tensor: `size` entries along each axis from `offset` on.

        Raises:
            DamagedCheckpoint: the box has gaps, or cannot be read.
        """
        planner = _PartPlanner(offset)
        values = torch.empty(*size, dtype=self.dtypes[name])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it reads in a single process
                load({name: values}, storage_reader=self._storage, planner=planner, no_dist=True)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise DamagedCheckpoint(f"checkpoint {self.path}: {name}, in "
                                    f"{' and '.join(self._files_of(name))}, cannot be read "
                                    f"({type(cause).__name__}: {cause}); use another checkpoint"
                                    ) from None
        if planner.found != values.numel():
            raise DamagedCheckpoint(f"checkpoint {self.path} holds {planner.found} of "
                                    f"{values.numel()} numbers of {name}; use another checkpoint")
        return values

    def _files_of(self, name: str) -> list[str]:
        stored = self._storage.read_metadata().storage_data
        places = [stored.get(MetadataIndex(name, box.offsets))
                  for box in self._tensors[name].chunks]
        return sorted({place.relative_path for place in places if place}) or ["no file"]


class _Storage(FileSystemReader):
    """Reader that keeps the index, instead of reading it again for every tensor."""

    _index: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Index of the checkpoint, read once."""
        self._index = self._index or super().read_metadata()
        return self._index


class _PartPlanner(DefaultLoadPlanner):
    """Planner that fills tensors from the box of the saved ones at `offset`, and counts the numbers
    `found`."""

    def __init__(self, offset: Sequence[int]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.offset, self.found = torch.Size(offset), 0

    def create_local_plan(self) -> LoadPlan:
        """Reads that fill the box, from whichever saved boxes overlap it."""
        items = []
        for name, tensor in self.state_dict.items():
            box = ChunkStorageMetadata(self.offset, tensor.shape)
            saved = self.metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, saved, [box])
        self.found = sum(math.prod(item.lengths) for item in items)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Tensor to fill."""
        return self.state_dict[index.fqn]
