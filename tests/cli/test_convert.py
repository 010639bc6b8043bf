"""tools/convert_checkpoint.py as it is typed; what converted models compute is in
distributed/test_conversion.py."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_spdf.architecture.base import EMBEDDING
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert import huggingface_export
from megatron_spdf.convert.huggingface_export import MASKS, WEIGHTS, export
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from megatron_spdf.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
import convert_checkpoint  # noqa: E402
import huggingface_models  # noqa: E402

pytestmark = pytest.mark.slow

SHAPE = (2, 64, 4, 256, 300, 32)  # of the workplace's recipe
TEXT = 'def f(x):\n\treturn f"{x}"  # naïve 漢字 \U0001f600   end'


@pytest.fixture(scope="module")
def gpt2(workplace):
    """A model of transformers with the tokenizer of the workplace's data."""
    huggingface_models.SHAPES["workplace"] = SHAPE
    directory = huggingface_models.save_gpt2("workplace", workplace / "gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(workplace / "tokenizer" / name, directory)
    return directory


@pytest.fixture
def convert(workplace, monkeypatch, capsys):
    """The tool in this process, in the workplace: exit code, standard output, standard error."""
    def convert(*words) -> tuple[int, str, str]:
        monkeypatch.chdir(workplace)
        code = convert_checkpoint.main([str(word) for word in words])
        return code, *capsys.readouterr()
    return convert


@pytest.fixture
def sparse(convert, gpt2, tmp_path):
    """A run at 75%, at step 0."""
    code, _, err = convert("from-hf", gpt2, tmp_path / "sparse", "--recipe", "recipe.yaml")
    assert code == 0, err
    return tmp_path / "sparse"


def start_tool(*words, cwd: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore",
               str(ROOT / "tools/convert_checkpoint.py"), *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def test_a_model_becomes_a_run_that_trains_and_a_model_again(convert, start, gpt2, workplace):
    tool = start_tool("from-hf", gpt2, "pruned", "optimizer.lr=2e-3", "--recipe", "recipe.yaml",
                      "--sparsity", "0.5",
                      "train.tokens=1024", "--select", "magnitude", cwd=workplace)
    out, err = tool.communicate(timeout=300)
    assert (tool.returncode, err) == (0, "") and "50.00% of 98,304 linear weights zero" in out
    assert "train it: pretrain.py pruned/recipe.yaml" in out
    process = start("output=pruned", "optimizer.lr=2e-3", "sparsity=0.5", "train.tokens=1024")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "resumed from step_00000000" in out, out + err
    assert find_checkpoint(workplace / "pruned").name == store.name_of(4)
    code, out, err = convert("to-hf", "pruned", "out/trained", "--masks", "--dtype", "bf16")
    assert code == 0 and err == "" and "step_00000004 as a GPT-2 of transformers, bf16" in out
    exported = workplace / "out" / "trained"
    assert [p.name for p in exported.parent.iterdir()] == ["trained"]
    assert {p.name for p in exported.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "masks.safetensors", "merges.txt",
        "model.safetensors",
        "tokenizer_config.json", "vocab.json"}
    before, after, masks = (load_file(path)
                            for path in (gpt2 / WEIGHTS, exported / WEIGHTS, exported / MASKS))
    assert len(masks) == 8 and before.keys() == after.keys()
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and int(mask.sum()) * 2 == mask.numel()
        assert not after[name][~mask].any() and after[name][mask].all()
        assert before[name].abs()[mask].min() > 0 and not torch.equal(after[name][mask].float(),
                                                                      before[name][mask])


def test_a_model_is_pruned_by_what_its_layers_read(workplace, convert, gpt2):
    tool = start_tool("from-hf", gpt2, "selected", "--recipe", "recipe.yaml", "--sparsity", "0.5",
                      "--select", "sparsegpt", "--calibration", "data/train",
                      "--calibration-samples", "16", "--sequence-length", "24", "--evaluate",
                      "data/valid", "train.precision=bf16", cwd=workplace)
    out, err = tool.communicate(timeout=300)
    assert (tool.returncode, err) == (0, "") and "50.00% of 98,304 linear weights zero" in out
    assert re.search(r"perplexity [0-9.]+ before, [0-9.]+ after, on 16 sequences of 24 tokens of "
                     "data/valid\n", out), out
    reader = CheckpointReader(find_checkpoint(workplace / "selected"), checksums=True)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    kept, before = reader.master(name), open_weights(gpt2).weight(name)
    assert int((kept != 0).sum()) * 2 == kept.numel()
    assert not torch.equal(kept[kept != 0], before[kept != 0])  # they have made up for the others


@pytest.mark.parametrize(("words", "said"), [
    (["--select", "wand"], "there is no selector 'wand'; known: wanda, "),
    (["--select", "wanda"], "select=wanda looks at the inputs of weights; give --calibration"),
    (["--select", "wanda", "--calibration", "data/no"], "data set data/no has no file data/no.bin"),
    (["--select", "wanda", "--calibration", "data/train", "--calibration-samples", "99999"],
     "--calibration-samples=99,999 are more than the "),
    (["--sequence-length", "8"], "are of the text that --calibration or --evaluate names"),
])
def test_a_selection_that_cannot_be_is_refused(convert, gpt2, tmp_path, words, said):
    code, _, err = convert("from-hf", gpt2, tmp_path / "run", "--recipe", "recipe.yaml",
                           "sparsity=0.5", *words)
    assert code == 2 and said in err and not (tmp_path / "run").exists()


def test_the_model_card_and_the_tokenizer(sparse, workplace, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    export(CheckpointReader(find_checkpoint(sparse)), tmp_path / "exported", masks=True)
    card = (tmp_path / "exported" / "README.md").read_text()
    for said in ("75.00% of the 98,304 weights", "random, seed 0", "step 0, 0 tokens, in fp32",
                 "level: 0.75",
                 "- Weights: fp32.", "Begun from: the Hugging Face model gpt2.",
                 "`masks.safetensors` holds a bool"):
        assert said in card
    assert str(workplace) not in card and str(tmp_path) not in card
    ours, theirs = (
        load_tokenizer(workplace / "tokenizer"),
        AutoTokenizer.from_pretrained(tmp_path / "exported"),
    )
    assert (
        theirs(TEXT)["input_ids"] == ours.encode(TEXT) and theirs.decode(ours.encode(TEXT)) == TEXT
    )
    assert (
        theirs.eos_token_id
        == ours.eod
        == GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id
    )


def test_dense_weights_come_back_bit_for_bit(convert, gpt2, tmp_path):
    assert convert("from-hf", gpt2, tmp_path / "run", "--recipe", "recipe.yaml",
                   "sparsity=0")[0] == 0
    for dtype in ("fp32", "bf16"):
        assert convert("to-hf", tmp_path / "run", tmp_path / dtype, "--dtype", dtype)[0] == 0
    first, again, half = (load_file(path / WEIGHTS)
                          for path in (gpt2, tmp_path / "fp32", tmp_path / "bf16"))
    assert first.keys() == again.keys() == half.keys() and len(first) == 4 + 2 * 12
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name].bfloat16(), half[name]) for name in first)


@pytest.mark.parametrize("name",
                         [name for name in huggingface_models.SHAPES if name != "workplace"])
def test_every_shape_comes_back_bit_for_bit(workplace, tmp_path, name):
    from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
    from megatron_spdf.convert.source import open_weights
    from megatron_spdf.recipe.recipe import Recipe

    huggingface_models.save_gpt2(name, tmp_path / "gpt2")
    recipe = load_recipe(workplace / "recipe.yaml").model_dump() | {
        "model": huggingface_models.shape_of(name)
    }
    recipe["sparsity"], recipe["train"] = 0.0, recipe["train"] | {"sequence_length": 8}
    tokenizer = load_tokenizer(workplace / "tokenizer")
    write_initial_checkpoint(open_weights(tmp_path / "gpt2"), Recipe.model_validate(recipe),
                             tokenizer, tmp_path / "run")
    export(CheckpointReader(find_checkpoint(tmp_path / "run")), tmp_path / "again")
    first, again = (load_file(tmp_path / place / WEIGHTS) for place in ("gpt2", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)


def test_runs_become_denser_sparser_and_are_laid_out_anew(convert, sparse, tmp_path):
    weights = "decoder.layers.0.mlp.linear_fc1.weight"
    before = CheckpointReader(find_checkpoint(sparse))
    for words, out, zeros in ((["densify"], "dense", 0.75),
                              # masks of one seed are nested
                              (["prune", "--sparsity", "0.9"], "sparser", 0.9),
                              (["prune", "sparsity.level=0.9", "--select", "magnitude"], "largest",
                               0.9),
                              (["reshard", "parallel.tensor=4"], "wide", 0.75),
                              (["branch", "train.tokens=1M", "optimizer.decay_share=0.5"], "long",
                               0.75)):
        code, said, err = convert(words[0], sparse, tmp_path / out, *words[1:])
        assert code == 0 and f"train it: pretrain.py {tmp_path / out}/recipe.yaml" in said, err
        reader = CheckpointReader(find_checkpoint(tmp_path / out), checksums=True)
        found = float((reader.weight(weights) == 0).float().mean())
        assert found == pytest.approx(zeros, abs=0.01), out
        assert reader.tokenizer.sha256 == before.tokenizer.sha256
        assert load_recipe(tmp_path / out / "recipe.yaml").output == str(tmp_path / out)
    assert CheckpointReader(find_checkpoint(tmp_path / "dense")).plan.weights == {}
    assert CheckpointReader(find_checkpoint(tmp_path / "wide")).recipe.parallel.tensor == 4
    long = CheckpointReader(find_checkpoint(tmp_path / "long")).recipe
    assert (long.train.tokens, long.optimizer.decay_share) == (10**6, 0.5)


def test_megatron_and_back(convert, sparse, tmp_path):
    code, said, _ = convert("to-megatron", sparse, tmp_path / "megatron", "--dtype", "bf16")
    assert (
        code == 0 and "Megatron-LM core_v0.16.1, bf16" in said and "--num-attention-heads 4" in said
    )
    code, said, err = convert("from-megatron", tmp_path / "megatron", tmp_path / "run", "--recipe",
                              "recipe.yaml",
                              "sparsity=0")
    tokenizer = CheckpointReader(find_checkpoint(sparse)).tokenizer.sha256
    assert code == 0 and f"that of the recipe's data is taken, sha256 {tokenizer}" in said, err
    run, before = (CheckpointReader(find_checkpoint(path)) for path in (tmp_path / "run", sparse))
    # rows, without padding
    real = {name: run.model.vocab_size if name == EMBEDDING else None for name in run.weights}
    assert all(torch.equal(run.weight(name)[:rows], before.weight(name)[:rows].bfloat16().float())
               for name, rows in real.items())


def test_refusals(convert, gpt2, sparse, workplace, tmp_path):
    wide = tmp_path / "bert"
    shutil.copytree(gpt2, wide)
    (wide / "config.json").write_text(json.dumps({"model_type": "bert"}))
    recipe, out = ["--recipe", "recipe.yaml"], tmp_path / "out"
    file = sparse / "recipe.yaml"
    for words, message in (
        (["from-hf", wide, out, *recipe],
         "is a model of type 'bert'; those that can be read are gpt2"),
        (["from-hf", gpt2, out, *recipe, "model.layers=4"],
         "model.layers is 2 there and 4 in the recipe"),
        (["from-hf", gpt2, out, *recipe, "model.vocab_size=50257"],
         "model.vocab_size=50257, but the data's tokenizer"),
        (["from-hf", gpt2, out, *recipe, "model.layer=4"], "did you mean model.layers?"),
        (["from-hf", gpt2, out, *recipe, "--sparsity", "1.5"],
         "sparsity.level=1.5: input should be less than 1"),
        (["from-hf", tmp_path, out, *recipe], "holds no weights; give a run directory"),
        (["from-megatron", gpt2, out, *recipe], "is no distributed checkpoint of Megatron-LM"),
        (["densify", sparse, sparse], "sparse exists; give a new directory"),
        (["densify", sparse, file / "x"], f"{file / 'x'} cannot be written: {file} is a file"),
        (["to-hf", tmp_path / "none", out], "none is neither a checkpoint"),
        (["reshard", sparse, out, "parallel.tensor=3"],
         "the nearest layout that the model allows is parallel.tensor="),
        (["reshard", sparse, out, "sparsity=0"], "sparsity=0: only parallel.* can change here"),
        (["reshard", sparse, out, "parallel.tensor=two"],
         "parallel.tensor='two': input should be a valid integer"),
        (["branch", sparse, out, "optimizer.lr=1"], "optimizer.lr is 0.001 there and 1.0 here"),
        (["branch", sparse, out, "sparsity.level=0.5"], "sparsity.level is 0.75 there and 0.5"),
        (["branch", sparse, out, "train.tokens=1", "optimizer.decay_share=0.5"],
         "optimizer.warmup_tokens="),
    ):
        code, said, err = convert(*words)
        assert (code, said) == (2,
                                "") and err.startswith("error: ") and message in err, (words, err)
        assert not out.exists() and not list(tmp_path.glob("*.partial"))
    code, _, err = convert("densify", sparse, tmp_path / "dense")
    assert code == 0 and convert("to-hf", tmp_path / "dense", out,
                                 "--masks")[2].endswith("leave out --masks\n")
    for words in (["to-hf", sparse, out, "parallel.tensor=2"],
                  ["densify", sparse, out, "--selct", "random"]):
        with pytest.raises(SystemExit, match="2"):
            convert(*words)


def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(convert, sparse, tmp_path):
    (file,) = find_checkpoint(sparse).glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for command in ("to-hf", "densify", "to-megatron", "reshard"):
        code, _, err = convert(command, sparse, tmp_path / "out")
        assert code == 2 and "__0_0.distcp has another content than was written" in err


@pytest.fixture(scope="module")
def large(workplace):
    """A model that takes some time to convert, and the recipe for it."""
    huggingface_models.SHAPES["large"] = (3, 768, 12, 3072, 300, 32)
    return huggingface_models.save_gpt2("large", workplace / "large")


LARGE = ["--recipe", "recipe.yaml", "model.hidden=768", "model.layers=3", "model.heads=12"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(workplace, large, tmp_path, number, code):
    def heed():  # where this test runs in the background, children ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    tool = start_tool("from-hf", large, tmp_path / "out", *LARGE, cwd=workplace, preexec_fn=heed)
    while not list(tmp_path.glob("out.partial/checkpoints/*/*.distcp")):
        assert tool.poll() is None, tool.communicate()
        time.sleep(0.002)
    tool.send_signal(number)
    _, err = tool.communicate(timeout=300)
    assert tool.returncode == code, err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_a_file_that_grows_too_large_leaves_nothing(workplace, gpt2, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    tool = start_tool("from-hf", gpt2, tmp_path / "out", "--recipe", "recipe.yaml", cwd=workplace,
                      preexec_fn=limit)
    _, err = tool.communicate(timeout=300)
    assert tool.returncode == 2 and "File too large; raise the limit of the size of files" in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(convert, gpt2, sparse, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        for command in (["from-hf", gpt2, disk / "out", "--recipe", "recipe.yaml"],
                        ["to-hf", sparse, disk / "out"], ["to-megatron", sparse, disk / "out"],
                        ["reshard", sparse, disk / "out"]):
            code, _, err = convert(*command)
            assert code == 2 and err.startswith(f"error: {disk}"), err
            assert "No space left on device; make room" in err, err
            assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_gpt2_cannot_express_is_refused(sparse, tmp_path):
    checkpoint = find_checkpoint(sparse)
    run = json.loads((checkpoint / store.RUN).read_text())
    run["recipe"]["model"]["query_groups"] = 2
    (checkpoint / store.RUN).write_text(json.dumps(run))
    listed = json.loads((checkpoint / store.FILES).read_text())
    listed[store.RUN] = store.describe(checkpoint / store.RUN)
    (checkpoint / store.FILES).write_text(json.dumps(listed))
    with pytest.raises(ValueError,
                       match="query_groups=2 and model.heads=4.*as many query groups as heads"):
        export(CheckpointReader(checkpoint), tmp_path / "grouped")
    assert [p.name for p in tmp_path.iterdir()] == ["sparse"]


def with_tokenizer(sparse: Path, tokenizer) -> CheckpointReader:
    reader = CheckpointReader(find_checkpoint(sparse))
    reader.tokenizer = tokenizer
    return reader


def exported_tokenizer(sparse: Path, tokenizer, directory: Path):
    from transformers import AutoTokenizer

    directory.mkdir()
    huggingface_export._save_tokenizer(with_tokenizer(sparse, tokenizer), directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return AutoTokenizer.from_pretrained(directory)


def test_a_tokenizer_json_is_exported(sparse, workplace, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    described = Tokenizer(models.BPE.from_file(*(str(workplace / "tokenizer" / n)
                                                 for n in ("vocab.json",
                                                                                           "merges.txt"))))
    described.pre_tokenizer, described.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    described.add_special_tokens(["<|endoftext|>"])
    described.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    theirs = exported_tokenizer(sparse, ours, tmp_path / "exported")
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT) and theirs.eos_token_id == ours.eod


def test_a_sentencepiece_model_is_exported_where_the_ids_are_ours(sparse, workplace, tmp_path):
    import sentencepiece

    texts = [json.loads(path.read_text())["text"] for path in (workplace / "text").glob("*.jsonl")]
    ours = train_tokenizer("sentencepiece", texts, 600, tmp_path / "sentencepiece")
    theirs = exported_tokenizer(sparse, ours, tmp_path / "exported")
    for text in (TEXT, " hello  world ", *texts):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(TEXT)) == TEXT and theirs.eos_token_id == ours.eod
    assert load_tokenizer(tmp_path / "sentencepiece").sha256 == ours.sha256
    # with SentencePiece's defaults: normalized, a space put before
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()),
        model_prefix=str(tmp_path / "unigram"), vocab_size=300,
        minloglevel=2)
    with pytest.raises(ValueError,
                       match="this SentencePiece model cannot be exported: transformers' "
                             "LlamaTokenizer"):
        exported_tokenizer(sparse, load_tokenizer(tmp_path / "unigram.model"), tmp_path / "unigram")
