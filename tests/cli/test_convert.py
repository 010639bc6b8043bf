"""tools/convert_checkpoint.py: what transformers loads computes what the engine does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_spdf.checkpoint import huggingface, store
from megatron_spdf.checkpoint.huggingface import export
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUNS = {f"tp{tensor} {level:.0%}": (tensor, level) for tensor in (1, 2) for level in (0.0, 0.75)}


@pytest.fixture(scope="module")
def make_run(start, workplace):
    """A short run whose learning rate moves biases and norms far from where they start; once per layout and level."""
    def make(name: str) -> Path:
        tensor, level = RUNS[name]
        run = workplace / f"converted_{tensor}_{level}"
        if not run.exists():
            process = start(f"output={run.name}", f"parallel.tensor={tensor}", f"sparsity={level}",
                            "train.tokens=1024", "optimizer.lr=2e-2", ranks=tensor if tensor > 1 else 0)
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, out + err
        return run
    return make


@pytest.fixture
def copy(make_run, tmp_path):
    """A copy of a checkpoint to change, and a way to change its run.json."""
    checkpoint = find_checkpoint(make_run("tp2 75%"))
    copied = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))

    def change(section: str, **values) -> CheckpointReader:
        run = json.loads((copied / store.RUN).read_text())
        place = run
        for key in section.split("."):
            place = place[key]
        place.update(values)
        (copied / store.RUN).write_text(json.dumps(run))
        listed = json.loads((copied / store.FILES).read_text())
        listed[store.RUN] = store.describe(copied / store.RUN)
        (copied / store.FILES).write_text(json.dumps(listed))
        return CheckpointReader(copied)
    return change


def convert(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/convert_checkpoint.py"), "to-hf", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def engine_logits(run: Path, ids: np.ndarray, directory: Path) -> torch.Tensor:
    np.save(directory / "ids.npy", ids)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("engine_logits.py")), str(run),
               str(directory / "ids.npy"), str(directory / "logits.npy")]
    done = subprocess.run(command, cwd=run.parent, env=environment, capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(directory / "logits.npy"))


@pytest.mark.parametrize("name", RUNS)
def test_the_exported_model_computes_what_the_engine_does(make_run, name, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    run = make_run(name)
    export(CheckpointReader(find_checkpoint(run)), tmp_path / "exported")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert type(model) is GPT2LMHeadModel and model.dtype == torch.float32
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = np.random.default_rng(0).integers(0, 300, (2, 32))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(ids)).logits  # (B, T, vocabulary)
    expected = engine_logits(run, ids, tmp_path)
    assert logits.shape == (2, 32, 300) and expected.shape == (2, 32, 384)
    assert expected.std() > 0.1  # so that the tolerance, some hundred roundings of fp32, says something
    assert (logits - expected[..., :300]).abs().max() <= 1e-4
    zeros = [float((p == 0).float().mean()) for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    assert len(zeros) == 8 and zeros == pytest.approx([RUNS[name][1]] * 8, abs=1e-3)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_tool_writes_a_directory_with_tokenizer_and_card(make_run, workplace, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    done = convert(make_run("tp2 75%"), tmp_path / "out" / "exported", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    exported = tmp_path / "out" / "exported"
    assert sorted(p.name for p in exported.parent.iterdir()) == ["exported"]
    assert {p.name for p in exported.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer_config.json", "vocab.json"}
    card = (exported / "README.md").read_text()
    for said in ("75.00% of the 98,304 weights", "step 4, 1,024 tokens", "level: 0.75", "Weights: bf16", "lr: 0.02"):
        assert said in card
    assert str(workplace) not in card
    ours, theirs = load_tokenizer(workplace / "tokenizer"), AutoTokenizer.from_pretrained(exported)
    text = 'def f(x):\n\treturn f"{x}"  # naïve 漢字 \U0001f600   end'
    assert theirs(text)["input_ids"] == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eod == GenerationConfig.from_pretrained(exported).eos_token_id
    again = convert(make_run("tp2 75%"), exported)
    assert again.returncode == 2 and "exists; give a new directory" in again.stderr


def test_bf16_is_fp32_rounded(make_run, tmp_path):
    from safetensors.torch import load_file

    reader = CheckpointReader(find_checkpoint(make_run("tp2 75%")))
    for dtype in ("fp32", "bf16"):
        export(reader, tmp_path / dtype, dtype)
    full, half = (load_file(tmp_path / dtype / huggingface.WEIGHTS) for dtype in ("fp32", "bf16"))
    assert full.keys() == half.keys() and len(full) == 4 + 2 * 12
    assert all(torch.equal(half[n], full[n].bfloat16()) for n in full)


def test_what_gpt2_cannot_express_is_refused(copy, tmp_path):
    with pytest.raises(ValueError, match="query_groups=2 and model.heads=4.*as many query groups as heads"):
        export(copy("recipe.model", query_groups=2), tmp_path / "grouped")
    with pytest.raises(ValueError, match="SentencePiece tokenizer cannot be exported yet"):
        export(copy("recipe.model", query_groups=4) and copy("tokenizer", kind="sentencepiece"), tmp_path / "pieces")
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004"]


def test_nothing_half_written_is_left(make_run, tmp_path, monkeypatch):
    reader = CheckpointReader(find_checkpoint(make_run("tp2 75%")))
    whole = reader.weight

    def full_disk(name: str):
        if "layers.1" in name:
            raise OSError("no space left on device")
        return whole(name)

    monkeypatch.setattr(reader, "weight", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export(reader, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_json_is_exported(make_run, workplace, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer

    described = Tokenizer(models.BPE.from_file(*(str(workplace / "tokenizer" / n) for n in ("vocab.json",
                                                                                           "merges.txt"))))
    described.pre_tokenizer, described.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    described.add_special_tokens(["<|endoftext|>"])
    described.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    reader = CheckpointReader(find_checkpoint(make_run("tp2 75%")))
    exported = tmp_path / "directory"
    exported.mkdir()
    huggingface._save_tokenizer(ours, reader, exported)
    (exported / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = AutoTokenizer.from_pretrained(exported)
    text = "def f(x): return 'naïve'\n"
    assert theirs(text)["input_ids"] == ours.encode(text) and theirs.eos_token_id == ours.eod
