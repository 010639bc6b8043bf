"""Invariant 8: no code is loaded from a checkpoint. A real index passes, and one that could run
code is refused before it does."""

from __future__ import annotations

import copyreg
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
)

import megatron_spdf
from megatron_spdf.checkpoint.safe_index import Box, IndexedTensor, Place, read_index
from megatron_spdf.checkpoint.store import DamagedCheckpoint
from megatron_spdf.checkpoint.tensors import TensorFiles
from megatron_spdf.checkpoint.writer import Shard, StoredTensor, whole, write_tensors

FILESYSTEM = "torch.distributed.checkpoint.filesystem"


class Runs:
    """Pickles to a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def name(module: str, attribute: str) -> bytes:
    """Pickle code that pushes an attribute of a module; unlike in text protocols it may be
    dotted."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, attribute))
    return words + b"\x93"


def text(word: str) -> bytes:
    return b"X" + len(word.encode()).to_bytes(4, "little") + word.encode()


def call(function: bytes, argument: bytes) -> bytes:
    return function + argument + b"\x85R"


def program(*code: bytes) -> bytes:
    return b"\x80\x04" + b"".join(code) + b"."


def system(command: str) -> bytes:
    return pickle.dumps(Runs(os.system, command))


def system_inside_data(command: str) -> bytes:
    return pickle.dumps({"a": [torch.Size([2]), {"b": Runs(os.system, command)}]})


def system_by_a_dotted_name(command: str) -> bytes:
    return program(call(name(FILESYSTEM, "os.system"), text(command)))


def evaluation(command: str) -> bytes:
    return pickle.dumps(Runs(eval, f"__import__('os').system({command!r})"))


def system_by_a_helper_that_an_index_module_imports(command: str) -> bytes:
    """`_get_device_module(x)` is `torch.x`: fetch torch._utils, make its `torch` be `os`, fetch
    `system`."""
    fetch = name(FILESYSTEM, "_get_device_module")
    swap = call(fetch, text("_utils")) + b"}" + text("torch") + name(FILESYSTEM, "os") + b"sb0"
    return program(swap, call(call(fetch, text("system")), text(command)))


ATTACKS = [system, system_inside_data, system_by_a_dotted_name, evaluation]


def write(directory: Path, content: bytes) -> Path:
    (directory / ".metadata").write_bytes(content)
    return directory


@pytest.fixture
def index(tmp_path) -> Path:
    """The directory of a real checkpoint: `w` in two parts, `b` in one."""
    (tmp_path / "real").mkdir()
    halves = tuple(Shard(f"__{i}_0.distcp", (2 * i, 0), (2, 3)) for i in range(2))
    write_tensors(tmp_path / "real", [
        StoredTensor("w", (4, 3), torch.float32, halves, lambda: torch.arange(12.0).view(4, 3)),
        StoredTensor("b", (3,), torch.bfloat16, whole((3,)), lambda: torch.ones(3).bfloat16())])
    return tmp_path / "real"


def change(directory: Path, how) -> Path:
    """Lets `how` change the index."""
    path = directory / ".metadata"
    loaded = pickle.loads(path.read_bytes())
    how(loaded)
    path.write_bytes(pickle.dumps(loaded))
    return directory


def test_index_of_a_real_checkpoint_is_read(index):
    files = TensorFiles(index)
    assert files.shapes == {"w": (4, 3), "b": (3,)}
    assert files.dtypes == {"w": torch.float32, "b": torch.bfloat16}
    assert files.tensor("w").equal(torch.arange(12.0).view(4, 3))
    assert files.part("w", (1, 1), (2, 2)).tolist() == [[4, 5], [7, 8]]
    assert files.tensor("b").equal(torch.ones(3).bfloat16())


def test_index_that_pytorch_writes_is_read(tmp_path):
    state = {"model": {"w": torch.ones(4, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
             "bits": torch.ones(2).byte(), "step": 3, "betas": (0.9, 0.999)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert TensorFiles(tmp_path, objects=True).tensor("model.w").equal(torch.ones(4, 3))
    with pytest.raises(ValueError, match="declares step as an object, which could be code"):
        read_index(tmp_path)


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_is_refused_and_does_not_run(tmp_path, attack):
    ran = tmp_path / "ran"
    payload = attack(f"touch '{ran}'")
    with pytest.raises(ValueError,
                       match=r"\.metadata is not the index of a checkpoint.*could run code"):
        read_index(write(tmp_path, payload))
    assert not ran.exists()
    pickle.loads(payload)
    assert ran.exists(), "the payload is harmless, so the test proves nothing"


def test_helpers_that_an_index_module_imports_are_refused(tmp_path, monkeypatch):
    # put back what the payload swaps, should it run
    monkeypatch.setattr(torch._utils, "torch", torch)
    ran = tmp_path / "ran"
    payload = system_by_a_helper_that_an_index_module_imports(f"touch '{ran}'")
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        read_index(write(tmp_path, payload))
    assert not ran.exists()


@pytest.mark.parametrize("module, attribute", [
    ("os", "system"), ("builtins", "exec"), ("builtins", "getattr"), ("torch", "load"),
    ("torch", "os"), ("torch.serialization", "load"), (FILESYSTEM, "FileSystem.rm_file"),
    (FILESYSTEM, "dataclass"), (FILESYSTEM, "os"), (FILESYSTEM, "__builtins__"),
    ("torch.distributed.checkpoint.planner", "reduce")])
def test_other_names_are_refused(tmp_path, module, attribute):
    with pytest.raises(ValueError, match=re.escape(f"it wants '{module}.{attribute}'")):
        read_index(write(tmp_path, program(name(module, attribute))))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_cut_index_is_refused(index, keep):
    content = (index / ".metadata").read_bytes()
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        read_index(write(index, content[:int(keep * len(content))]))


@pytest.mark.parametrize("content", [b"not a pickle", b"\x80\x04K\x01", b"\x80\xff.", bytes(64),
                                     b"\x80\x04\x8c\x02\xff\xfe.", b"\x80\x04}]K\x01s.",
                                     pickle.dumps({"a": 1})])
def test_what_is_no_index_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        read_index(write(tmp_path, content))


def test_missing_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        read_index(tmp_path)


def test_persistent_object_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        read_index(write(tmp_path, program(text("id") + b"Q")))


W, B = MetadataIndex("w", torch.Size([2, 0])), MetadataIndex("b", torch.Size([0]))


def declare_an_object(loaded):
    loaded.state_dict_metadata["b"] = BytesStorageMetadata()


def rename_a_file(name):
    def how(loaded):
        loaded.storage_data[W].relative_path = name
    return how


def place(**fields):
    def how(loaded):
        vars(loaded.storage_data[W]).update(fields)
    return how


def compress(loaded):
    loaded.storage_data[W].transform_descriptors = ["zstd"]


def forget_a_place(loaded):
    del loaded.storage_data[W]


def two_in_one_place(loaded):
    loaded.storage_data[W] = loaded.storage_data[MetadataIndex("w", torch.Size([0, 0]))]


class Twin:
    """Pickles to an entry's key, and is another key of a dictionary."""

    __class__ = property(lambda self: MetadataIndex)

    def __reduce_ex__(self, _):
        return copyreg.__newobj__, (MetadataIndex,), vars(W)


def two_places(loaded):
    loaded.storage_data[Twin()] = _StorageInfo("__0_0.distcp", 0, 10)


def huge(loaded):
    entry = loaded.state_dict_metadata["w"]
    entry.size = torch.Size([10**12, 3])
    entry.chunks[1] = ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([10**12 - 2, 3]))


def outside_of_the_shape(loaded):
    loaded.state_dict_metadata["w"].chunks[1].sizes = torch.Size([3, 3])


def other_axes(loaded):
    loaded.state_dict_metadata["w"].chunks[1].sizes = torch.Size([2])


def many_axes(loaded):
    loaded.state_dict_metadata["w"].size = torch.Size([1] * 1000)


def another_type(loaded):
    loaded.state_dict_metadata["w"].properties.dtype = torch.complex64


def no_chunks(loaded):
    loaded.state_dict_metadata["w"].chunks = None


def entry_of_another_kind(loaded):
    loaded.state_dict_metadata["w"] = _StorageInfo("__0_0.distcp", 0, 10)


def name_with_an_escape(loaded):
    loaded.state_dict_metadata["\033[2J"] = loaded.state_dict_metadata["b"]


def no_storage(loaded):
    loaded.storage_data = None


def hashes_for_ever(loaded):
    """A key whose hash takes 2 ** 60 steps."""
    key = ()
    for _ in range(60):
        key = (key, key)
    loaded.planner_data = Runs(dict, [])
    loaded.planner_data = {"a": [key]}
    loaded.state_dict_metadata["w"].size = key


WRONG = {
    "object": (declare_an_object, "declares b as an object, which could be code"),
    "absolute": (rename_a_file("/etc/passwd"), "names the file '/etc/passwd'"),
    "above": (rename_a_file("../__0_0.distcp"), "names the file '../__0_0.distcp'"),
    "below": (rename_a_file("tokenizer/__0_0.distcp"), "names the file"),
    "newline": (rename_a_file("__0_0.distcp\n"), "names the file"),
    "nul": (rename_a_file("__0_0\0.distcp"), "names the file"),
    "other file": (rename_a_file("run.json"), "names the file 'run.json'"),
    "hidden": (rename_a_file(".hidden.distcp"), "names the file '.hidden.distcp'"),
    "path object": (rename_a_file(Path("__0_0.distcp")), "something else in place of str"),
    "missing file": (rename_a_file("__9_0.distcp"), "names __9_0.distcp, which is missing"),
    "behind the end": (place(offset=10**6), "says that w ends at byte 1,0.* of __1_0.distcp"),
    "too long": (place(length=10**5), "says that w ends at byte 100,000"),
    "much too long": (place(length=10**12), "is smaller than its 1,000,000,000,000 bytes"),
    "before the start": (place(offset=-1), "in place of whole numbers"),
    "no number": (place(offset="0"), "in place of whole numbers"),
    "a truth": (place(length=True), "in place of whole numbers"),
    "a fraction": (place(length=1.0), "in place of whole numbers"),
    "too short": (place(length=20), "part of w at .2, 0. is larger than its 20 bytes"),
    "compressed": (compress, "is compressed or encrypted"),
    "no place": (forget_a_place, "does not say where the part of w at .2, 0. is"),
    "two in one": (two_in_one_place, "has w and w in the same bytes of __0_0.distcp"),
    "two places": (two_places, "it has two places of 'w'"),
    "huge": (huge, "part of w at .2, 0. is larger than its"),
    "outside": (outside_of_the_shape, "part of w lies outside of its shape"),
    "other axes": (other_axes, "part of w lies outside of its shape"),
    "many axes": (many_axes, "in place of whole numbers"),
    "type": (another_type, "it wants 'torch.complex64'"),
    "no chunks": (no_chunks, "something else in place of list"),
    "other kind": (entry_of_another_kind, "in place of TensorStorageMetadata"),
    "escape": (name_with_an_escape, r"tensor of the name '.{1,2}x1b"),
    "no storage": (no_storage, "something else in place of dict"),
    "hash": (hashes_for_ever, "in place of whole numbers"),
}


@pytest.mark.parametrize("how, said", WRONG.values(), ids=WRONG)
def test_what_the_index_says_is_vetted(index, how, said):
    with pytest.raises(ValueError, match=said) as caught:
        read_index(change(index, how))
    assert str(index) in str(caught.value) and "se another" in str(caught.value) or (
        "use a checkpoint" in str(caught.value))


def gap(loaded):
    del loaded.state_dict_metadata["w"].chunks[1]


def twice(loaded):
    loaded.state_dict_metadata["w"].chunks[1].offsets = torch.Size([1, 0])
    loaded.storage_data[MetadataIndex("w", torch.Size([1, 0]))] = loaded.storage_data.pop(W)


def cells_without_end(loaded):
    """Ten million cells between the edges of a few boxes."""
    entry = loaded.state_dict_metadata["w"]
    entry.size = torch.Size([10**9] * 3)
    entry.chunks = [ChunkStorageMetadata(torch.Size([3 * i + 1] * 3), torch.Size([1] * 3))
                    for i in range(120)]
    info = loaded.storage_data[B]
    for i, chunk in enumerate(entry.chunks):
        loaded.storage_data[MetadataIndex("w", chunk.offsets)] = _StorageInfo(
            info.relative_path, i * 5, 4)
    del loaded.state_dict_metadata["b"]


@pytest.mark.parametrize("how", [gap, twice, cells_without_end])
def test_parts_that_do_not_make_the_tensor_are_refused(index, how):
    files = TensorFiles(change(index, how), objects=True)
    with pytest.raises(DamagedCheckpoint, match="does not hold every number of w once"):
        files.tensor("w")


@pytest.mark.parametrize(("cuts", "looked_at"), [(999, True), (1000, False)])
def test_no_more_than_a_million_cells_are_looked_at(cuts, looked_at):
    """Rows above columns of a number each make the whole tensor, in (cuts + 1) x cuts cells."""
    place = Place("__0_0.distcp", 0, 4)
    boxes = [Box((row, 0), (1, cuts), place) for row in range(cuts)]
    boxes += [Box((cuts, column), (1, 1), place) for column in range(cuts)]
    tensor = IndexedTensor((cuts + 1, cuts), torch.float32, tuple(boxes))
    assert tensor.covered is looked_at


def other_shape(file):
    torch.save(torch.ones(3, 2), file)


def other_dtype(file):
    torch.save(torch.ones(2, 3, dtype=torch.float64), file)


def an_object(file):
    torch.save({"w": 1}, file)


def code(file):
    torch.save(Runs(os.system, f"touch '{file.parent / 'ran'}'"), file)


def expanded(file):
    torch.save(torch.ones(1).expand(2, 3), file)


@pytest.mark.parametrize("write_it", [other_shape, other_dtype, an_object, code, expanded])
def test_what_the_file_holds_is_compared_with_the_index(index, write_it):
    write_it(index / "__1_0.distcp")
    change(index, place(offset=0, length=(index / "__1_0.distcp").stat().st_size))
    with pytest.raises(DamagedCheckpoint, match="w, in __1_0.distcp, cannot be read"):
        TensorFiles(index).tensor("w")
    assert not (index / "ran").exists()


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(index, tmp_path, name, kind):
    path = index / name
    path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file|symbolic links|Is a directory"):
        read_index(index)


def test_what_was_vetted_is_what_is_loaded(index, tmp_path):
    files = TensorFiles(index)
    ran = tmp_path / "ran"
    write(index, system(f"touch '{ran}'"))
    assert files.tensor("w").equal(torch.arange(12.0).view(4, 3))
    code(index / "__1_0.distcp")
    with pytest.raises(DamagedCheckpoint, match="w, in __1_0.distcp, cannot be read"):
        files.tensor("w")
    (index / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (index / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="b, in __0_0.distcp, cannot be read"):
        files.tensor("b")
    assert not ran.exists() and not (index / "ran").exists()


def test_pytorch_never_unpickles_what_is_read(index, monkeypatch):
    def never(*_, **__):
        raise AssertionError("unpickled")

    for module, function in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, function, never)
    assert TensorFiles(index).tensor("w").numel() == 12


# a tuple whose hash takes 2 ** 20 steps
PAIR_OF_PAIRS = b")q\x00" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(20))
SET_STATE = name("torch.distributed.checkpoint.metadata", "Metadata") + b"}" + text(
    "__slots__") + text("x") + b"sb"


@pytest.mark.slow
@pytest.mark.parametrize("content, said", [
    (program(SET_STATE), "sets the state of torch.distributed.checkpoint.metadata.Metadata"),
    (program(name("torch", "float32"), b"}b"), "sets the state of torch.float32"),
    (b"\x80\x04" + b"(" * 2000 + b"t" * 2000 + b".", "nested deeper than"),
    (b"\x80\x04K\x00r\xff\xff\xff\x7f.", "something else in place of Metadata"),
    (b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "in place of Metadata"),
    (b"\x80\x04" + b")" + b"\x85" * 10**6 + b".", "in place of Metadata"),
    (b"\x80\x04}" + PAIR_OF_PAIRS + b"K\x01s.", "it has tuple where that cannot be"),
    (b"\x80\x04" + b"\x8d" + bytes([255] * 7) + b"\x7f.", "cannot be read"),
    (b"\x80\x04\x95" + bytes([255] * 7) + b"\x7f.", "in place of|cannot be read"),
    (b"I" + b"9" * 10**6 + b"\n.", "cannot be read"),
    (b"\x80\x02\x82\x01.", "opcode EXT1"),
    (b"(ios\nsystem\n.", "opcode INST"),
], ids=["class", "dtype", "marks", "memo", "lists", "tuples", "hash", "long text", "frame",
        "digits", "extension", "instance"])
def test_bombs_and_states_of_classes_are_refused(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read_index(write(tmp_path, content))


@pytest.mark.parametrize("name", ["__0_0.distcp", "__9_9.distcp"])
def test_bytes_that_are_no_tensors_are_refused(index, name):
    with (index / name).open("ab") as file:
        file.truncate(1 << 42)  # a file of one hole
    with pytest.raises(DamagedCheckpoint, match=f"does not say what .* bytes of {name} are"):
        read_index(index)


def test_an_entry_in_a_hole_takes_no_memory(index):
    with (index / "__1_0.distcp").open("ab") as file:
        file.truncate(1 << 42)
    change(index, place(offset=0, length=1 << 42))
    with pytest.raises(ValueError, match="is smaller than its 4,398,046,511,104 bytes"):
        read_index(index)


def test_nothing_in_the_package_loads_a_pickle():
    loads = re.compile(r"(?<!`)\b(torch|pickle|dill|joblib|dist_checkpointing|dcp)\.loads?\("
                       r"|allow_pickle|Unpickler|FileSystemReader|LoadPlanner")
    root = Path(megatron_spdf.__file__).parent
    assert not [f"{path.name}: {line}" for path in root.rglob("*.py")
                for line in path.read_text().splitlines() if loads.search(line)]


@pytest.mark.slow
def test_endless_index_is_refused(tmp_path):
    with (tmp_path / ".metadata").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than 268,435,456 bytes"):
        read_index(tmp_path)
