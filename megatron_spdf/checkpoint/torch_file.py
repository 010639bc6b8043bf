"""Reads what `torch.save` wrote, as data: plain values and tensors, which are views of the bytes.

`torch.load(weights_only=True)` takes the lengths of storages, and the places of tensors in them, on
trust. Here each is compared with the bytes that are there.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_spdf.checkpoint.pickles import MOST_BYTES, Name, NotData, Record, read_pickle
from megatron_spdf.checkpoint.safe_index import DTYPES
from megatron_spdf.files import open_regular

_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Double": torch.float64, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16,
    "Int": torch.int32, "Long": torch.int64, "Bool": torch.bool}.items()}
_TENSOR, _WITH_ATTRIBUTES = "torch._utils._rebuild_tensor_v2", "torch._tensor._rebuild_from_type_v2"
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_NAMES = {*_STORAGES, *DTYPES, _TENSOR, _WITH_ATTRIBUTES, *_PARAMETER, "collections.OrderedDict",
          "torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter",
          "torch.serialization._get_layout", "__builtin__.set", "builtins.set"}
_MOST_AXES = 8
_ZIP_MAGIC = b"PK\3\4"
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field
# of the format before PyTorch 1.6: pickles one after the other, then the storages
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001


def read_file(path: Path, allowed: Collection[str] = ()) -> Any:
    """Reads a file of `torch.save`. Its tensors come from the disk when they are used.

    Args:
        allowed: full names of further classes, whose objects become `Record`s.

    Raises:
        NotData: it holds another class, or is not consistent.
        OSError: it cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise NotData("it is empty") from None
    return (_Zip if content[:4] == _ZIP_MAGIC else _Old)(content).read(allowed)


def read_part(file: IO[bytes], offset: int, length: int) -> Any:
    """Reads what `torch.save` wrote to a part of a file, in its format of zip files.

    Raises:
        NotData, OSError: as `read_file`.
    """
    content = mmap.mmap(-1, max(length, 1))
    file.seek(offset)
    if file.readinto(content) != length:
        raise NotData(f"it ends before byte {offset + length:,}")
    return _Zip(content).read(())


class _Content(ABC):
    """Bytes of a file, and the storages in them that its pickle refers to."""

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.storages: dict[str, Tensor] = {}

    @abstractmethod
    def read(self, allowed: Collection[str]) -> Any:
        """Object that was saved."""

    @abstractmethod
    def extent(self, key: str) -> tuple[int, int]:
        """First byte of a storage, and bytes."""

    def unpickle(self, stream: IO[bytes], allowed: Collection[str]) -> Any:
        return read_pickle(stream, {*_NAMES, *allowed}, _make, self.storage)

    def storage(self, place: Any) -> Tensor:
        """Vector of all numbers of a storage, by the id that the pickle gives it."""
        kind, key, numel = _storage_id(place)
        if key not in self.storages:
            start, length = self.extent(key)
            if length != numel * kind.itemsize:
                raise NotData(f"its storage {key[:100]!r} has {length:,} bytes instead of "
                              f"{numel * kind.itemsize:,}")
            self.storages[key] = (torch.frombuffer(self.content, dtype=kind, count=numel,
                                                   offset=start) if numel else
                                  torch.empty(0, dtype=kind))
        elif self.storages[key].dtype != kind:
            raise NotData(f"its storage {key[:100]!r} has two types")
        return self.storages[key]


class _Zip(_Content):
    """Zip file: archive/data.pkl, and archive/data/KEY for each storage."""

    def __init__(self, content: mmap.mmap):
        super().__init__(content)
        try:
            records = zipfile.ZipFile(content).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, OverflowError, ValueError,
                struct.error) as error:
            raise NotData(f"it is no file of torch.save ({error})") from None
        self.records = {record.filename.partition("/")[2]: record for record in records}
        if len(self.records) != len(records):
            raise NotData("it has two records of one name")

    def read(self, allowed: Collection[str]) -> Any:
        if "byteorder" in self.records and self.bytes_of("byteorder") != b"little":
            raise NotData("its numbers are big-endian; save it on another machine")
        return self.unpickle(io.BytesIO(self.bytes_of("data.pkl")), allowed)

    def extent(self, key: str) -> tuple[int, int]:
        return self.extent_of(f"data/{key}")

    def extent_of(self, name: str) -> tuple[int, int]:
        record = self.records.get(name)
        if record is None:
            raise NotData(f"it has no record {name[:100]!r}")
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise NotData(f"its record {name[:100]!r} is compressed or encrypted")
        header = record.header_offset
        if not 0 <= header <= len(self.content) - _LOCAL_HEADER.size:
            raise NotData(f"its record {name[:100]!r} is not inside of it")
        start = header + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack_from(self.content, header))
        if start + record.file_size > len(self.content):
            raise NotData(f"its record {name[:100]!r} is not inside of it")
        return start, record.file_size

    def bytes_of(self, name: str) -> bytes:
        start, length = self.extent_of(name)
        if length > MOST_BYTES:
            raise NotData(f"its record {name[:100]!r} has more than {MOST_BYTES:,} bytes")
        return self.content[start:start + length]


class _Old(_Content):
    """Format before PyTorch 1.6."""

    def read(self, allowed: Collection[str]) -> Any:
        for expected in (_OLD_MAGIC, _OLD_VERSION):
            if self.plain() != expected:
                raise NotData("it is no file of torch.save")
        system = self.plain()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise NotData("its numbers are big-endian; save it on another machine")
        start = self.content.tell()
        kinds: dict[str, torch.dtype] = {}

        def note(place: Any) -> Tensor:
            kind, key, _ = _storage_id(place)
            kinds[key] = kind
            return torch.empty(0)

        read_pickle(self.content, {*_NAMES, *allowed}, Record, note)
        self.extents = dict(self.find(kinds, self.plain()))
        self.content.seek(start)
        return self.unpickle(self.content, allowed)

    def plain(self) -> Any:
        return read_pickle(self.content, ())

    def find(self, kinds: dict[str, torch.dtype], keys: Any) -> Iterator[tuple[str, tuple]]:
        """Storages in the order of the file, each after its number of entries."""
        if not isinstance(keys, list):
            raise NotData("it has no list of storages")
        place = self.content.tell()
        for key in keys:
            count = self.content[place:place + 8]
            if not isinstance(key, str) or key not in kinds or len(count) < 8:
                raise NotData("its list of storages is not what it holds")
            length = int.from_bytes(count, "little") * kinds[key].itemsize
            if place + 8 + length > len(self.content):
                raise NotData("it ends too early")
            yield key, (place + 8, length)
            place += 8 + length

    def extent(self, key: str) -> tuple[int, int]:
        if key not in self.extents:
            raise NotData(f"it has no storage {key[:100]!r}")
        return self.extents[key]


def _storage_id(place: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and entries of a storage: ("storage", class, key, device, entries)."""
    if not isinstance(place, tuple) or len(place) not in (5, 6) or place[5:] not in ((), (None,)):
        raise NotData("it has an id of something else than a storage")
    word, kind, key, _, numel = place[:5]
    if not (isinstance(word, str) and word == "storage" and isinstance(kind, Name)
            and kind.full in _STORAGES and isinstance(key, str) and _is_size(numel)):
        raise NotData("it has an id of something else than a storage")
    return _STORAGES[kind.full], key, numel


def _make(function: str, arguments: tuple) -> Any:
    """Tensor of a call that makes one. A `Record` of any other call."""
    if function in _PARAMETER and arguments and isinstance(arguments[0], Tensor):
        return arguments[0]
    if function == _WITH_ATTRIBUTES and len(arguments) == 4:
        inner, _, its_arguments, _ = arguments
        if isinstance(inner, Name) and inner.full in (_TENSOR, *_PARAMETER) and (
                isinstance(its_arguments, tuple)):
            return _make(inner.full, its_arguments)
    if function != _TENSOR:
        return Record(function, arguments)
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Tensor):
        raise NotData("it has a tensor without a storage")
    flat, offset, size, stride = arguments[:4]
    if not (_is_size(offset) and isinstance(size, tuple) and isinstance(stride, tuple)
            and len(size) == len(stride) <= _MOST_AXES and all(map(_is_size, (*size, *stride)))):
        raise NotData("it has a tensor of no shape")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if numel > flat.numel() or numel and last >= flat.numel():
        raise NotData(f"it has a tensor of shape {size} in a storage of {flat.numel():,} numbers")
    negated = _is_negated(*arguments[6:])
    try:
        made = flat.as_strided(size, stride, offset) if numel else flat.new_empty(size)
    except RuntimeError:
        raise NotData(f"it has a tensor of shape {size} and strides {stride}") from None
    return made.neg() if negated else made


def _is_negated(flags: Any = None) -> bool:
    """True if a tensor has its storage's numbers with the other sign, as PyTorch marks one that is
    negated when it is read."""
    if flags is None:
        return False
    if not isinstance(flags, dict) or any(key != "neg" or value is not True
                                          for key, value in flags.items()):
        raise NotData("it has a tensor of flags that are not known")
    return bool(flags)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
