"""Files of torch.save, read as data: what PyTorch reads is read alike, and what is not consistent
is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_spdf.checkpoint.pickles import NotData, Record
from megatron_spdf.checkpoint.torch_file import read_file, read_part

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8,
          torch.int16, torch.int32, torch.int64, torch.bool]


def saved(path: Path, content: object, new: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=new)
    return path


def marked() -> torch.Tensor:
    tensor = torch.arange(3.0)
    tensor.note = "an attribute"
    return tensor


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_it_reads_what_pytorch_reads(tmp_path, new):
    whole = torch.arange(24.0).view(4, 6)
    content = OrderedDict(
        {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
        whole=whole, turned=whole.T, part=whole[1:3, ::2], scalar=torch.tensor(7),
        empty=torch.empty(0, 3), parameter=nn.Parameter(whole), attribute=marked(),
        negated=torch.arange(3.0).to(torch.complex64).mul(1j).conj().imag,
        module=nn.Linear(2, 3).state_dict(), shape=whole.shape, plain=[1, -2.5, "é", None, (True,)])
    found = read_file(saved(tmp_path / "file", content, new))
    again = torch.load(tmp_path / "file", weights_only=True)
    assert list(found) == list(again)
    for name, value in again.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert again["negated"].is_neg() and found["negated"].tolist() == [0, -1, -2]
    assert torch.equal(found["module"]["weight"], content["module"]["weight"])
    assert found["plain"] == content["plain"] and found["shape"] == (4, 6)
    assert found["whole"].data_ptr() == found["turned"].data_ptr()


class Code:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch '{self.place}'",)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("allowed", [(), ["collections.deque"]])
def test_code_is_refused_and_does_not_run(tmp_path, new, allowed):
    path = saved(tmp_path / "file", {"w": torch.ones(2), "more": Code(tmp_path / "ran")}, new)
    with pytest.raises(NotData, match="it wants 'posix.system'"):
        read_file(path, allowed)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload is harmless, so the test proves nothing"


def test_an_object_of_an_allowed_class_is_not_made(tmp_path):
    path = saved(tmp_path / "file", Code(tmp_path / "ran"))
    found = read_file(path, ["posix.system"])
    assert isinstance(found, Record) and found.kind == "posix.system"
    assert not (tmp_path / "ran").exists()


def rewritten(path: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    """The file with its records changed: name without the first folder -> bytes."""
    with zipfile.ZipFile(path) as old:
        records = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in records.items():
            new.writestr(f"archive/{name}", content)
    return path


def pickled(numel: int = 6, offset: int = 0, size: object = (2, 3), stride: object = (3, 1),
            key: object = "0", storage: object = torch.FloatStorage) -> bytes:
    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", storage, key, "cpu", numel) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(Tensor())
    return buffer.getvalue()


@pytest.mark.parametrize("changes, said", [
    ({"numel": 10**12}, "has 24 bytes instead of 4,000,000,000,000"),
    ({"numel": 7}, "has 24 bytes instead of 28"), ({"numel": 5}, "has 24 bytes instead of 20"),
    ({"numel": -1}, "id of something else"), ({"numel": True}, "id of something else"),
    ({"storage": torch.DoubleStorage}, "has 24 bytes instead of 48"),
    ({"storage": torch.float32}, "id of something else"), ({"key": 0}, "id of something else"),
    ({"key": "../../etc/passwd"}, "has no record"), ({"key": "1"}, "has no record"),
    ({"size": (10**6, 10**6), "stride": (0, 0)}, "in a storage of 6 numbers"),
    ({"size": (3, 3)}, "in a storage of 6 numbers"), ({"offset": 1}, "in a storage of 6 numbers"),
    ({"stride": (4, 1)}, "in a storage of 6 numbers"), ({"offset": -1}, "no shape"),
    ({"stride": (-3, 1)}, "no shape"), ({"size": (2, -3)}, "no shape"),
    ({"size": (1,) * 99, "stride": (1,) * 99}, "no shape"), ({"size": [2, 3]}, "no shape"),
    ({"stride": (3,)}, "no shape"), ({"size": (2.0, 3)}, "no shape"),
    ({"size": (0, 1 << 61), "stride": (1 << 61, 1 << 61), "offset": 1 << 61}, "of shape|^$")])
def test_what_a_pickle_says_of_its_storages_is_held_against_them(tmp_path, changes, said):
    path = saved(tmp_path / "file", torch.arange(6.0).view(2, 3))
    assert torch.equal(read_file(rewritten(path, lambda r: r.update({"data.pkl": pickled()}))),
                       torch.arange(6.0).view(2, 3))
    rewritten(path, lambda r: r.update({"data.pkl": pickled(**changes)}))
    if said.endswith("|^$"):  # no numbers, so any shape will do
        assert read_file(path).numel() == 0
        return
    with pytest.raises(NotData, match=said):
        read_file(path)


def test_compressed_records_are_refused(tmp_path):
    path = saved(tmp_path / "file", torch.zeros(1 << 20))
    rewritten(path, lambda records: None, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(NotData, match="is compressed or encrypted"):
        read_file(path)


def test_big_endian_numbers_are_refused(tmp_path):
    path = saved(tmp_path / "file", torch.zeros(2))
    with pytest.raises(NotData, match="big-endian"):
        read_file(rewritten(path, lambda records: records.update({"byteorder": b"big"})))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_cut_files_are_refused(tmp_path, new, keep):
    path = saved(tmp_path / "file", {"w": torch.ones(100), "b": torch.ones(50)}, new)
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content))])
    with pytest.raises(NotData):
        read_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_flipped_bytes_are_read_or_refused(tmp_path, new):
    path = saved(tmp_path / "file", {"w": torch.ones(3), "b": nn.Parameter(torch.ones(2))}, new)
    content, draw = path.read_bytes(), torch.Generator().manual_seed(0)
    for place in torch.randint(len(content), (300,), generator=draw).tolist():
        bad = bytearray(content)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            read_file(path)
        except NotData:
            pass


def test_a_storage_longer_than_a_legacy_file_is_refused(tmp_path):
    path = saved(tmp_path / "file", {"w": torch.ones(3)}, new=False)
    content = path.read_bytes()
    assert content[-20:-12] == struct.pack("<q", 3)
    path.write_bytes(content[:-20] + struct.pack("<q", 10**12) + content[-12:])
    with pytest.raises(NotData, match="ends too early"):
        read_file(path)


def test_links_and_pipes_are_refused_and_not_waited_for(tmp_path):
    saved(tmp_path / "file", torch.ones(1))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(OSError):
            read_file(tmp_path / name)


def test_a_part_of_a_file_is_read(tmp_path):
    buffer = io.BytesIO()
    torch.save(torch.arange(5.0), buffer)
    part = buffer.getvalue()
    file = io.BytesIO(b"before" + part + b"after")
    assert torch.equal(read_part(file, 6, len(part)), torch.arange(5.0))
    for place in ((0, len(part)), (6, len(part) + 6), (6, 10), (6, 0), (10**9, 5)):
        with pytest.raises(NotData):
            read_part(file, *place)
