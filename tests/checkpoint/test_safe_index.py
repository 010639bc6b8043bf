"""Invariant 8: no code is loaded from a checkpoint. A real index passes, and one that could run
code is refused before it does."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_spdf.checkpoint.safe_index import vet_metadata

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
    """The directory of a real checkpoint."""
    state = {"model": {"w": torch.ones(4, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
             "bits": torch.ones(2).byte(),
             "step": 3, "betas": (0.9, 0.999)}
    dcp.save(state, checkpoint_id=tmp_path / "real", no_dist=True)
    return tmp_path / "real"


def test_index_of_a_real_checkpoint_is_accepted(index):
    vet_metadata(index)


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_is_refused_and_does_not_run(tmp_path, attack):
    ran = tmp_path / "ran"
    payload = attack(f"touch '{ran}'")
    with pytest.raises(ValueError,
                       match=r"\.metadata is not the index of a checkpoint.*could run code"):
        vet_metadata(write(tmp_path, payload))
    assert not ran.exists()
    pickle.loads(payload)
    assert ran.exists(), "the payload is harmless, so the test proves nothing"


def test_helpers_that_an_index_module_imports_are_refused(tmp_path, monkeypatch):
    # put back what the payload swaps, should it run
    monkeypatch.setattr(torch._utils, "torch", torch)
    ran = tmp_path / "ran"
    payload = system_by_a_helper_that_an_index_module_imports(f"touch '{ran}'")
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        vet_metadata(write(tmp_path, payload))
    assert not ran.exists()


@pytest.mark.parametrize("module, attribute", [
    ("os", "system"), ("builtins", "exec"), ("builtins", "getattr"), ("torch", "load"),
    ("torch", "os"), ("torch.serialization", "load"), (FILESYSTEM, "FileSystem.rm_file"),
    (FILESYSTEM, "dataclass"), (FILESYSTEM, "os"), (FILESYSTEM, "__builtins__"),
    ("torch.distributed.checkpoint.planner", "reduce")])
def test_other_names_are_refused(tmp_path, module, attribute):
    with pytest.raises(ValueError, match="it wants " + f"{module}.{attribute}".replace(".", r"\.")):
        vet_metadata(write(tmp_path, program(name(module, attribute))))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_cut_index_is_refused(index, keep):
    content = (index / ".metadata").read_bytes()
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        vet_metadata(write(index, content[:int(keep * len(content))]))


@pytest.mark.parametrize("content", [b"not a pickle", b"\x80\x04K\x01", b"\x80\xff.", bytes(64),
                                     b"\x80\x04\x8c\x02\xff\xfe.", b"\x80\x04}]K\x01s.",
                                     pickle.dumps({"a": 1})])
def test_what_is_no_index_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        vet_metadata(write(tmp_path, content))


def test_missing_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        vet_metadata(tmp_path)


def test_persistent_object_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the index of a checkpoint"):
        vet_metadata(write(tmp_path, program(text("id") + b"Q")))
