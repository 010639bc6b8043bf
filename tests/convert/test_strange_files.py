"""Files of strangers in the formats that are imported: nothing in them is run, nothing outside of
their directory is read, nothing is waited for, and every refusal is a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import MODEL, gpt2_tensors

from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.convert.deepspeed_import import DeepSpeedReader
from megatron_spdf.convert.foreign import place_of, read_word, require_finite
from megatron_spdf.convert.huggingface_import import HuggingFaceReader
from megatron_spdf.convert.megatron_lm import MegatronReader
from megatron_spdf.convert.source import open_weights

SHAPE = Gpt.model_validate(MODEL)


class Code:
    """Pickles to a command that leaves a file."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch '{self.place}'",)


def test_an_adapter_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="holds an adapter of PEFT .*; merge it into its model"):
        open_weights(tmp_path)


@pytest.fixture
def split(gpt2) -> Path:
    """A model in two files with an index."""
    (gpt2 / "model.safetensors").unlink()
    tensors = gpt2_tensors()
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    for number, half in enumerate(halves):
        save_file(half, gpt2 / f"{number}.safetensors")
    point_at(gpt2, lambda number: f"{number}.safetensors")
    return gpt2


def point_at(model: Path, name) -> None:
    """Writes the index with other names of the files."""
    listed = {key: name(i % 2) for i, key in enumerate(gpt2_tensors())}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


@pytest.mark.parametrize("name", [
    "../other/{}.safetensors", "{}/../../other/0.safetensors", "/{}.safetensors", "", "..", ".",
    "sub/{}.safetensors", "{}\n.safetensors", "{}\0.safetensors", "{}" + "x" * 300, 7, None, ["a"],
    {"a": 1}])
def test_an_index_names_what_lies_beside_it(split, name):
    other = split.parent / "other"
    other.mkdir()
    for number in range(2):
        (other / f"{number}.safetensors").write_bytes(
            (split / f"{number}.safetensors").read_bytes())
    point_at(split, lambda i: name.format(i) if isinstance(name, str) else name)
    with pytest.raises(ValueError, match="which is no file beside it"):
        HuggingFaceReader(split)


@pytest.mark.parametrize("name", ["0.safetensors", "tokenizer.json"])
def test_pointers_of_git_lfs_in_a_model_say_what_they_are(split, name):
    (split / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
        assert HuggingFaceReader(split).tokenizer


@pytest.mark.parametrize("target", ["outside", "pipe", "device", "loop"])
def test_links_that_lead_out_of_a_model_are_refused(split, target):
    outside = split.parent / "outside"
    (split / "0.safetensors").rename(outside)
    if target == "pipe":
        os.mkfifo(split / "0.safetensors")
    else:
        (split / "0.safetensors").symlink_to(
            {"outside": outside, "device": "/dev/zero", "loop": "0.safetensors"}[target])
    with pytest.raises((ValueError, OSError, RuntimeError),
                       match="leads out|has no file 0|[Ss]ymlink loop"):
        HuggingFaceReader(split)


def test_a_model_in_the_cache_of_the_hub_is_read(gpt2, tmp_path):
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/0a1b"
    for place in (blobs, snapshot):
        place.mkdir(parents=True)
    torch.save(gpt2_tensors(), gpt2 / "pytorch_model.bin")
    for kind in ("model.safetensors", "pytorch_model.bin"):
        for name in ("config.json", kind):
            (blobs / f"blob of {name}").write_bytes((gpt2 / name).read_bytes())
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(f"../../blobs/blob of {name}")
        reader = open_weights(snapshot)
        assert all(torch.equal(reader.weight(name), HuggingFaceReader(gpt2).weight(name))
                   for name in reader.weights)
        (snapshot / kind).unlink()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("inside", [lambda code: {"w": code}, lambda code: code,
                                    lambda code: {**gpt2_tensors(), "more": [{"deep": code}]}])
def test_a_pickled_model_with_code_is_refused(gpt2, tmp_path, new, inside):
    (gpt2 / "model.safetensors").unlink()
    torch.save(inside(Code(tmp_path / "ran")), gpt2 / "pytorch_model.bin",
               _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read without running code "
                                         ".it wants 'posix.system'.*save the model as safetensors"):
        HuggingFaceReader(gpt2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("word", ["../elsewhere", "iter_0000001/../../x", "²", "-1", "9" * 5000,
                                  "release\0", "", "\033[2J"])
def test_a_tracker_of_megatron_names_a_checkpoint_of_its_own(tmp_path, word):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(ValueError, match="names|cannot be read") as caught:
        MegatronReader(tmp_path, SHAPE)
    assert str(caught.value).isprintable()


def deepspeed(directory: Path, **changes: object) -> Path:
    """A checkpoint as DeepSpeed without ZeRO writes it."""
    place = directory / "global_step2"
    place.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    module = {weight.name: torch.randn(weight.shape, generator=draw) for weight in SHAPE.weights()}
    torch.save({"module": module, "buffer_names": [], "param_shapes": None, "dp_world_size": 1}
               | changes, place / "mp_rank_00_model_states.pt")
    (directory / "latest").write_text("global_step2")
    return place


def test_a_sound_checkpoint_of_deepspeed_is_read(tmp_path):
    deepspeed(tmp_path)
    reader = DeepSpeedReader(tmp_path, SHAPE)
    assert all(reader.weight(name).shape == weight.shape for name, weight in reader.weights.items())


@pytest.mark.parametrize("where", ["client", "module", "buffer_names", "param_shapes"])
def test_a_checkpoint_of_deepspeed_with_code_is_refused(tmp_path, where):
    deepspeed(tmp_path / "run", **{where: Code(tmp_path / "ran")})
    with pytest.raises(ValueError, match="mp_rank_00_model_states.pt cannot be read without "
                                         "running code .it wants 'posix.system'.*client_state"):
        DeepSpeedReader(tmp_path / "run", SHAPE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", [
    {"module": None}, {"module": []}, {"module": {}}, {"module": {1: torch.ones(1)}},
    {"buffer_names": None}, {"buffer_names": ["none"]}, {"param_shapes": 7},
    {"param_shapes": [{"w": (10**12,)}]}, {"param_shapes": [{"w": "x"}]},
    {"param_shapes": [{"w": (-1, 2)}]}, {"param_shapes": [["w"]]},
    {"param_shapes": [{weight.name: weight.shape for weight in SHAPE.weights()}]},
    {"module": {"\033[2J": torch.ones(1)}}])
def test_a_checkpoint_of_deepspeed_that_is_none_is_refused(tmp_path, changes):
    deepspeed(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        reader = DeepSpeedReader(tmp_path, SHAPE)
        for name in reader.weights:
            reader.weight(name)
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("plant", ["path", "link", "pipe", "linked file", "long"])
def test_nothing_outside_of_a_checkpoint_of_deepspeed_is_read(tmp_path, plant):
    run, outside = tmp_path / "run", deepspeed(tmp_path / "outside")
    place = deepspeed(run)
    if plant == "path":
        (run / "latest").write_text("../outside/global_step2")
    elif plant == "link":
        (run / "link").symlink_to(outside)
        (run / "latest").write_text("link")
    elif plant == "long":
        (run / "latest").write_text("x" * 10**6)
    else:
        file = place / "mp_rank_00_model_states.pt"
        file.unlink()
        if plant == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to(outside / file.name)
    with pytest.raises(ValueError, match="may only name|leads out|no regular file|more than 200"):
        DeepSpeedReader(run, SHAPE)


def test_a_linked_model_is_read(gpt2, tmp_path):
    (tmp_path / "link").symlink_to(gpt2)
    assert HuggingFaceReader(tmp_path / "link").weights


@pytest.mark.parametrize(("length", "read"), [(200, True), (201, False)])
def test_a_word_in_a_file_is_short(tmp_path, length, read):
    file = tmp_path / "latest"
    file.write_text("x" * (length - 1) + "\n")
    if read:
        assert read_word(file) == "x" * (length - 1)
    else:
        with pytest.raises(ValueError, match="it has more than 200 bytes"):
            read_word(file)


@pytest.mark.parametrize(("name", "taken"), [("x" * 255, True), ("x" * 256, False), (".x", True)])
def test_a_name_of_a_file_is_one_that_file_systems_take(tmp_path, name, taken):
    if taken:
        assert place_of(tmp_path, name, tmp_path / "index") == tmp_path / name
    else:
        with pytest.raises(ValueError, match="which is no file beside it"):
            place_of(tmp_path, name, tmp_path / "index")


def test_entries_that_are_not_finite_are_counted_and_the_first_is_placed(tmp_path):
    values = torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 5.0, float("inf")]])
    with pytest.raises(ValueError, match=r"w has 2 entries that are not finite .* nan at \[1, 0\]"):
        require_finite(values, "w", tmp_path)
    large = torch.tensor([1e38, 1e39], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"w has 1 entries .* 1e\+39 at \[1\]"):
        require_finite(large, "w", tmp_path)
    assert require_finite(large[:1], "w", tmp_path) is not None
