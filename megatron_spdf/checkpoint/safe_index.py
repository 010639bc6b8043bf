"""Reads a checkpoint's index as data, and vets what it says of the files.

Megatron-Core's format keeps its index, `.metadata`, as a pickle that PyTorch loads without
restriction. Here it is read once, as data, and turned into names, shapes and places in files. What
has been vetted is what is loaded. Nothing reads the pickle again.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_spdf.checkpoint.pickles import MOST_BYTES, Name, NotData, Record, read_pickle
from megatron_spdf.checkpoint.store import DamagedCheckpoint
from megatron_spdf.files import open_regular

INDEX = ".metadata"
DTYPES = {f"torch.{name}": getattr(torch, name) for name in (
    "float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64",
    "bool")}
_CHECKPOINT = "torch.distributed.checkpoint."
_METADATA, _STORAGE = f"{_CHECKPOINT}metadata.", f"{_CHECKPOINT}filesystem._StorageInfo"
_NAMES = {
    *DTYPES, _STORAGE, "collections.OrderedDict", "builtins.set", "builtins.frozenset",
    "torch.Size", "torch.device", "torch.serialization._get_layout", "pathlib.PosixPath",
    "pathlib.Path", "pathlib._local.PosixPath",
    *(_METADATA + name for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *(f"{_CHECKPOINT}planner.{name}" for name in (
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}
_FILE = re.compile(r"\w[\w.-]{0,250}\.distcp", re.ASCII)
_MOST_AXES, _MOST_CELLS = 8, 1_000_000
_MOST_BESIDE = 1 << 20  # bytes that a saved tensor has beside its numbers
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Bytes of a file of the checkpoint."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Box:
    """Part of a tensor that is saved in one piece."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class IndexedTensor:
    """Tensor of the index. Its boxes lie inside its shape, and their bytes inside the files."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]

    @property
    def covered(self) -> bool:
        """True if the boxes hold every number once."""
        cuts = [sorted({0, length, *itertools.chain.from_iterable(
                    (box.offset[axis], box.offset[axis] + box.size[axis]) for box in self.boxes)})
                for axis, length in enumerate(self.shape)]
        lengths = [len(places) - 1 for places in cuts]
        if math.prod(lengths) > _MOST_CELLS:
            return False
        cells = np.zeros(lengths, np.int32)
        for box in self.boxes:
            cells[tuple(slice(*np.searchsorted(places, (start, start + length)))
                        for places, start, length in zip(cuts, box.offset, box.size, strict=True)
                        )] += 1
        return bool((cells == 1).all())


def read_index(checkpoint: Path, objects: bool = False) -> dict[str, IndexedTensor]:
    """Reads and vets a checkpoint's index.

    Args:
        checkpoint: directory of the checkpoint.
        objects: let it name objects beside the tensors, which are never read.

    Returns:
        Tensors by their names in the file.

    Raises:
        ValueError: it holds anything but an index, or declares an object where there may be none.
        DamagedCheckpoint: it is not consistent, or not with the files.
    """
    path = checkpoint / INDEX
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise NotData(f"it has more than {MOST_BYTES:,} bytes")
        declared, places = _parts(read_pickle(io.BytesIO(content), _NAMES))
        tensors = {name: _tensor(name, entry, places) for name, entry in declared.items()
                   if not _is_object(name, entry, objects)}
    except (NotData, OSError) as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {error}. It is a pickle and "
                         "could run code, so it is refused; use a checkpoint that this program "
                         "wrote") from None
    used = _check_files(checkpoint, tensors)
    for file in () if objects else checkpoint.glob("*.distcp"):
        rest = _regular_size(checkpoint, file.name) - used.get(file.name, 0)
        if rest:
            raise _damaged(checkpoint, f"does not say what {rest:,} bytes of {file.name} are")
    return tensors


def _parts(index: Any) -> tuple[dict[str, Record], dict[tuple, Place]]:
    """Entries of an index by name, and their places by name and offset."""
    fields = _fields(index, _METADATA + "Metadata")
    declared = _of(dict, fields.get("state_dict_metadata"))
    places: dict[tuple, Place] = {}
    for key, value in _of(dict, fields.get("storage_data")).items():
        index_fields = _fields(key, _METADATA + "MetadataIndex")
        offset = index_fields.get("offset")
        where = (_of(str, index_fields.get("fqn")), None if offset is None else _sizes(offset))
        if where in places:
            raise NotData(f"it has two places of {where[0][:100]!r}")
        places[where] = _place(_fields(value, _STORAGE))
    for name in declared:
        if not _of(str, name).isprintable() or len(name) > 1000:
            raise NotData(f"it has a tensor of the name {name[:100]!r}")
    return declared, places


def _is_object(name: str, entry: Any, allowed: bool) -> bool:
    if _of(Record, entry).kind != _METADATA + "BytesStorageMetadata":
        return False
    if not allowed:
        raise NotData(f"it declares {name} as an object, which could be code; the checkpoints of "
                      "a run hold tensors alone")
    return True


def _place(fields: dict[str, Any]) -> Place:
    file = _of(str, fields.get("relative_path"))
    if not _FILE.fullmatch(file):
        raise NotData(f"it names the file {file[:100]!r}, and the files of a checkpoint have plain "
                      "names that end in .distcp")
    if fields.get("transform_descriptors"):
        raise NotData(f"the content of {file} is compressed or encrypted")
    return Place(file, *_sizes((fields.get("offset"), fields.get("length"))))


def _tensor(name: str, entry: Record, places: dict[tuple, Place]) -> IndexedTensor:
    fields = _fields(entry, _METADATA + "TensorStorageMetadata")
    properties = _of(Record, fields.get("properties"))
    dtype = _of(Name, _of(tuple, properties.state)[0] if properties.state else None).full
    shape = _sizes(fields.get("size"))
    if properties.kind != _METADATA + "TensorProperties" or dtype not in DTYPES:
        raise NotData(f"{name} has no type that a tensor here can have")
    boxes = []
    for chunk in _of(list, fields.get("chunks")):
        parts = _fields(chunk, _METADATA + "ChunkStorageMetadata")
        offset, size = _sizes(parts.get("offsets")), _sizes(parts.get("sizes"))
        if not len(offset) == len(size) == len(shape) or any(
                start + length > whole for start, length, whole in zip(offset, size, shape,
                                                                       strict=True)):
            raise NotData(f"a part of {name} lies outside of its shape {shape}")
        place = places.get((name, offset))
        if place is None:
            raise NotData(f"it does not say where the part of {name} at {offset} is")
        beside = place.length - math.prod(size) * DTYPES[dtype].itemsize
        if not 0 <= beside <= _MOST_BESIDE:
            raise NotData(f"the part of {name} at {offset} is "
                          f"{'larger' if beside < 0 else 'smaller'} than its {place.length:,} "
                          f"bytes of {place.file}")
        boxes.append(Box(offset, size, place))
    return IndexedTensor(shape, DTYPES[dtype], tuple(boxes))


def _check_files(checkpoint: Path, tensors: dict[str, IndexedTensor]) -> Counter[str]:
    """Bytes of each file that the tensors take.

    Raises:
        DamagedCheckpoint: a place lies in another, or not in a regular file.
    """
    used: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    end, before = Place("", 0, 0), ""
    spots = ((box.place, name) for name, tensor in tensors.items() for box in tensor.boxes)
    for place, name in sorted(spots, key=lambda s: (s[0].file, s[0].offset, s[0].length)):
        if place.file not in sizes:
            sizes[place.file] = _regular_size(checkpoint, place.file)
        if place.offset + place.length > sizes[place.file]:
            raise _damaged(checkpoint, f"says that {name} ends at byte "
                           f"{place.offset + place.length:,} of {place.file}, which has "
                           f"{sizes[place.file]:,}")
        if place.file == end.file and place.offset < end.offset + end.length:
            raise _damaged(checkpoint, f"has {before} and {name} in the same bytes of {place.file}")
        end, before = place, name
        used[place.file] += place.length
    return used


def _regular_size(checkpoint: Path, file: str) -> int:
    try:
        found = (checkpoint / file).lstat()
    except OSError:
        raise _damaged(checkpoint, f"names {file}, which is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise _damaged(checkpoint, f"names {file}, which is no regular file")
    return found.st_size


def _damaged(checkpoint: Path, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: its index {INDEX} {what}. "
                             "Remove it to resume from the one before, or use another checkpoint")


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """Attributes of an object of the class `kind`."""
    if not isinstance(value, Record) or value.kind != kind or value.arguments:
        raise NotData(f"it has something else in place of {kind.rpartition('.')[2]}")
    return _of(dict, value.state)


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise NotData(f"it has something else in place of {kind.__name__}")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    """Whole numbers of 0 or more, one for each axis."""
    if type(value) is not tuple or len(value) > _MOST_AXES or any(
            type(n) is not int or not 0 <= n < 1 << 62 for n in value):
        raise NotData("it has something else in place of whole numbers")
    return value
