"""tools/inspect_checkpoint.py and the reader behind it, on the checkpoint of a real run on two
ranks."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.inspect import verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import inspect_checkpoint  # noqa: E402

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def run(start, workplace):
    """A short run at tensor-parallel degree 2, its first block dense in the feed-forward layers."""
    rules = ("sparsity.rules=[{weights: 'decoder.layers.0.mlp.*', level: 0.0}, "
             "{weights: '*_fc2.*', level: 0.9}]")
    process = start("output=inspected", "parallel.tensor=2", "train.tokens=1024", rules, ranks=2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return workplace / "inspected"


@pytest.fixture(scope="module")
def checkpoint(run):
    return find_checkpoint(run)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


@pytest.fixture(scope="module")
def whole(checkpoint):
    """Every tensor of the checkpoint, read in one piece by PyTorch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = checkpoint.parent / "whole.pt"
    dcp_to_torch_save(checkpoint, file)
    tensors = flatten(torch.load(file, weights_only=True))
    file.unlink()
    return tensors


def flatten(values: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value,
                                                                 dict) else {prefix + key: value}
    return found


def start_tool(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error",
               str(ROOT / "tools/inspect_checkpoint.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def inspect(*words) -> subprocess.CompletedProcess:
    """The tool in this process, since importing PyTorch takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = inspect_checkpoint.main([str(word) for word in words])
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def refusal(*words) -> str:
    done = inspect(*words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.stderr


def by_hand(values: np.ndarray, bits: np.ndarray, shape: tuple[int, int], axis: int) -> np.ndarray:
    """The dense weight entry by entry: bit i of a slice, highest bit of a byte first, is its entry
    i in row order."""
    dense = np.zeros(shape, values.dtype)
    for slice, part in enumerate(np.split(dense, len(values), axis)):  # views
        left = iter(values[slice])
        for i in range(part.size):
            if bits[slice, i // 8] >> (7 - i % 8) & 1:
                part[i // part.shape[1], i % part.shape[1]] = next(left)
        assert next(left, None) is None
    return dense


def test_the_reader_gives_every_weight_whole_and_dense(checkpoint, whole):
    reader = CheckpointReader(checkpoint)
    assert len(reader.plan.weights) == 6
    assert set(whole) >= set(reader.shapes)
    stored = dict(whole)
    for name, weight in reader.weights.items():
        place = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        place = place.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if place in stored:
            expected = stored.pop(place).numpy()
        else:
            values, bits = (
                stored.pop(f"{place}.values").numpy(),
                stored.pop(f"{place}.mask_bits").numpy(),
            )
            axis = 0 if "qkv" in name or "fc1" in name else 1
            expected = by_hand(values, bits, weight.shape, axis)
        got = reader.weight(name)
        assert got.shape == weight.shape
        assert np.array_equal(got.numpy(), expected), name
    assert all(name.startswith("optimizer.state.") for name in stored)


def test_the_weights_are_those_that_the_model_computes_with(checkpoint, whole):
    from megatron_spdf.layers.compact import CompactWeight

    reader = CheckpointReader(checkpoint)
    for name, planned in reader.plan.weights.items():
        compact = CompactWeight(planned, reader.plan.seed, 0, 1, "cpu")
        assert torch.equal(reader.weight(name), compact(whole[f"{name}.values"])), name


def test_a_run_directory_is_its_newest_complete_checkpoint(run, checkpoint):
    assert checkpoint == run / "checkpoints" / "step_00000004"
    unfinished = run / "checkpoints" / "step_00000008.partial"
    unfinished.mkdir()
    try:
        assert find_checkpoint(run) == checkpoint
    finally:
        unfinished.rmdir()


def test_it_says_what_is_there(run):
    done = start_tool(run, "--verify")
    assert done.returncode == 0 and done.stderr == "", done
    for said in ("2 layers x 64 hidden, 4 heads", "vocabulary 300 (padded to 384), 32 positions",
                 "tensor 2 x pipeline",
                 "step 4, 1,024 tokens, 4 optimizer steps, 0 skipped", "linear_proj.weight",
                 "89.9902%",
                 f"megatron-core {version('megatron-core')}", "saved:", "verified: every file",
                 "6 masks are as planned"):
        assert said in done.stdout, done.stdout


def test_json_holds_the_same_and_the_bytes_add_up(run, checkpoint, whole):
    facts = json.loads(inspect(run, "--json").stdout)
    assert facts["checkpoint"] == str(checkpoint) and facts["verified"] is None
    counted = {key: facts["state"][key]
               for key in ("step", "optimizer_steps", "skipped", "skipped_in_a_row", "tokens")}
    assert counted == {"step": 4, "optimizer_steps": 4, "skipped": 0, "skipped_in_a_row": 0,
                       "tokens": 1024}
    assert facts["layout"]["tensor"] == 2
    rows = {(row["kind"].split(".")[-2], row["count"], row["target"])
            for row in facts["sparsity"]["weights"]}
    fc2 = 1 - 4 * round(0.1 * 64 * 64) / (64 * 256)
    assert rows == {("linear_qkv", 2, 0.75), ("linear_proj", 2, 0.75), ("linear_fc1", 1, 0.75),
                    ("linear_fc2", 1, fc2)}
    assert all(row["measured"] == pytest.approx([row["target"]] * 2)
               for row in facts["sparsity"]["weights"])
    parts = facts["bytes"]
    assert parts["total"] == sum(t.nbytes for t in whole.values())
    active = facts["model"]["active_parameters"]
    assert (
        parts["sparse_values"] + parts["other_weights"] == 4 * active
        and parts["optimizer"] == 12 * active
    )
    assert 8 * parts["mask_bits"] == 2 * (3 + 1) * 64 * 64 + 2 * 4 * 64 * 64
    assert json.loads(inspect(run, "--json", "--verify").stdout)["verified"]


def test_what_is_no_checkpoint_is_refused(run, tmp_path):
    assert "neither a checkpoint" in refusal(tmp_path)
    assert "neither a checkpoint" in refusal(tmp_path / "missing")
    (tmp_path / "checkpoints" / "step_00000004.partial").mkdir(parents=True)
    assert "no complete checkpoint" in refusal(tmp_path)
    assert "did not finish" in refusal(tmp_path / "checkpoints" / "step_00000004.partial")


def test_a_flipped_bit_is_found_by_verify(copy):
    file = max(copy.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert inspect(copy).returncode == 0
    said = refusal(copy, "--verify")
    assert file.name in said and "another content" in said


@pytest.mark.parametrize("words", [(), ("--verify",)])
def test_truncated_and_missing_files_are_named(copy, words):
    first, second = sorted(copy.glob("*.distcp"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    said = refusal(copy, *words)
    assert f"{first.name} has" in said and f"{second.name} is missing" in said
    (copy / store.FILES).unlink()
    assert "files.json cannot be read" in refusal(copy, *words)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-2], None],
                         ids=["flip", "truncate", "delete"])
def test_verify_names_every_file_that_is_damaged(copy, damage):
    names = [*store.files_of(copy), store.FILES]
    assert {Path(n).suffix for n in names} >= {".distcp", ".json", ".pt", ""}  # "": .metadata
    for name in names:
        whole = (copy / name).read_bytes()
        if damage is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(damage(whole))
        assert name in refusal(copy, "--verify")
        (copy / name).write_bytes(whole)
    assert inspect(copy, "--verify").returncode == 0


def changed_run(copy: Path, change) -> None:
    """Changes run.json and lists the file as it is then, as a checkpoint written so would be."""
    run = json.loads((copy / store.RUN).read_text())
    change(run)
    (copy / store.RUN).write_text(json.dumps(run))
    listed = json.loads((copy / store.FILES).read_text())
    listed[store.RUN] = store.describe(copy / store.RUN)
    (copy / store.FILES).write_text(json.dumps(listed))


def test_masks_of_another_seed_are_refused(copy):
    changed_run(copy, lambda run: run["recipe"]["sparsity"].update(seed=5))
    assert inspect(copy).returncode == 0
    said = refusal(copy, "--verify")
    assert f"slice 0 of {QKV} has another mask than seed 5 draws" in said and "and 1 more" in said


def test_tensors_of_another_shape_are_refused(copy):
    changed_run(copy, lambda run: run["recipe"]["model"].update(max_positions=64))
    said = refusal(copy, "--verify")
    assert "position_embeddings.weight has shape (32, 64) instead of (64, 64)" in said


def test_weights_that_are_not_there_are_refused(copy):
    changed_run(copy, lambda run: run["recipe"]["model"].update(layers=3))
    with pytest.raises(ValueError, match=r"decoder\.layers\.2\.[a-z_.]+ is missing; .* more"):
        verify(CheckpointReader(copy))


def test_a_run_file_that_says_too_little_is_refused(copy):
    changed_run(copy, lambda run: run.pop("state"))
    assert "run.json, line 1: state is missing" in refusal(copy)
