"""Reads the tensors of a `torch_dist` directory, Megatron-Core's format, one at a time in one
process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_spdf.checkpoint.pickles import NotData
from megatron_spdf.checkpoint.safe_index import Box, IndexedTensor, read_index
from megatron_spdf.checkpoint.store import DamagedCheckpoint
from megatron_spdf.checkpoint.torch_file import read_part
from megatron_spdf.files import open_regular


class TensorFiles:
    """`torch_dist` directory whose index has been vetted.

    The index is read once. Every tensor comes from where it said, and is compared with it.

    Args:
        path: directory.
        objects: let there be objects beside the tensors, which are never read.

    Attributes:
        shapes, dtypes: of every tensor by its name in the file.

    Raises:
        ValueError: the index is missing, or holds code; see `safe_index.read_index`.
    """

    def __init__(self, path: Path, objects: bool = False):
        self.path = path
        self._tensors = read_index(path, objects)
        self.shapes = {name: entry.shape for name, entry in self._tensors.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._tensors.items()}

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's values."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def tensor(self, name: str) -> Tensor:
        """Reads a whole tensor by its name in the file, to CPU, in the dtype it was saved in.

        Raises:
            DamagedCheckpoint: it is missing, has gaps, or cannot be read.
        """
        return self.part(name, (0,) * len(self._entry(name).shape), self._entry(name).shape)

    def part(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """Reads a box of a tensor: `size` entries along each axis from `offset` on.

        Raises:
            DamagedCheckpoint: it is missing, has gaps, or cannot be read.
        """
        self._check_covered(name)
        values = torch.empty(*size, dtype=self._entry(name).dtype)
        self.fill(name, offset, values)
        return values

    def fill(self, name: str, offset: Sequence[int], values: Tensor) -> None:
        """Reads the box of a tensor at `offset` into `values`, which give its size.

        Raises:
            DamagedCheckpoint: as `part`.
        """
        self._check_covered(name)
        for box in self._entry(name).boxes:
            common = [(max(a, b), min(a + m, b + n)) for a, m, b, n in zip(
                offset, values.shape, box.offset, box.size, strict=True)]
            if all(low < high for low, high in common):
                there, here = (tuple(slice(low - start, high - start) for (low, high), start in
                                     zip(common, starts, strict=True))
                               for starts in (box.offset, offset))
                values[here].copy_(self._read(name, box)[there])

    def check(self, name: str) -> None:
        """Raises DamagedCheckpoint unless a tensor is in the files as the index says."""
        self._check_covered(name)
        for box in self._entry(name).boxes:
            self._read(name, box)

    def _entry(self, name: str) -> IndexedTensor:
        if name not in self._tensors:
            raise DamagedCheckpoint(f"checkpoint {self.path} has no tensor {name}; use another "
                                    "checkpoint")
        return self._tensors[name]

    def _check_covered(self, name: str) -> None:
        if not self._entry(name).covered:
            raise DamagedCheckpoint(f"checkpoint {self.path} does not hold every number of {name} "
                                    "once; use another checkpoint")

    def _read(self, name: str, box: Box) -> Tensor:
        place, dtype = box.place, self._tensors[name].dtype
        try:
            with open_regular(self.path / place.file) as file:
                saved = read_part(file, place.offset, place.length)
            if not isinstance(saved, Tensor) or (saved.dtype, saved.shape) != (dtype, box.size):
                raise NotData(f"it is no tensor of shape {box.size} and type {dtype}")
            return saved
        except (NotData, OSError) as error:
            raise DamagedCheckpoint(f"checkpoint {self.path}: {name}, in {place.file}, cannot be "
                                    f"read ({error}); use another checkpoint") from None
