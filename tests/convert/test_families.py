"""Llama, Mistral, Qwen2 and Qwen3 go in and out of transformers' directories: to the bit, with
everything read off config.json, and what does not fit refused by name."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from stories import NO_STORIES, STORIES, TEXT, write_stories

from megatron_spdf.architecture.base import ARCHITECTURES
from megatron_spdf.architecture.forms import model_of
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_export import INDEX, WEIGHTS, _save_tokenizer
from megatron_spdf.convert.megatron_lm import MegatronReader, arguments, save_for_megatron
from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from megatron_spdf.evaluation.subspace import distances

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
import convert_checkpoint  # noqa: E402
from families import FAMILIES, LLAMA3, make_family, save_family  # noqa: E402
from huggingface_models import logits_of  # noqa: E402

ALL = [ARCHITECTURES.get(name) for name in ("gpt", "llama", "mistral", "qwen2", "qwen3")]
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
IDS = torch.randint(0, 280, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of 280 ids, fewer than the models' 300 rows."""
    directory = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer("bpe", [(ROOT / "README.md").read_text()], 280, directory)
    return directory


@pytest.fixture
def given(tokenizer, tmp_path):
    """A family's directory with a tokenizer."""
    def make(family: str, **changes) -> Path:
        directory = save_family(family, tmp_path / "given", **changes)
        for file in tokenizer.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        return directory
    return make


def convert(*words) -> int:
    return convert_checkpoint.main([str(word) for word in words])


def reader_of(run: Path) -> CheckpointReader:
    return CheckpointReader(find_checkpoint(run))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_to_the_bit(given, tmp_path, family):
    """In several files, with nothing said but the directories."""
    directory = given(family)
    assert convert("from-hf", directory, tmp_path / "run") == 0
    assert convert("to-hf", tmp_path / "run", tmp_path / "out", "--shard-size", "0.0001") == 0
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and not (tmp_path / "out" / WEIGHTS).exists()
    there = {}
    for file in files:
        there |= load_file(tmp_path / "out" / file)
    weights = load_file(directory / WEIGHTS)
    assert there.keys() == weights.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(4 * w.numel() for w in weights.values())
    assert all(torch.equal(there[name], weights[name]) for name in weights)
    again, before = (open_weights(tmp_path / name) for name in ("out", "given"))
    assert not again.model.differences(before.model)
    assert torch.equal(logits_of(tmp_path / "out", IDS), logits_of(directory, IDS))


def test_bf16_stays_bf16(given, tmp_path):
    directory = given("qwen2")
    make_family("qwen2").to(torch.bfloat16).save_pretrained(directory)
    assert convert("from-hf", directory, tmp_path / "run") == 0
    run = reader_of(tmp_path / "run")
    assert run.recipe.train.precision == "bf16" and run.recipe.train.sequence_length == 32
    assert convert("to-hf", tmp_path / "run", tmp_path / "out", "--dtype", "bf16") == 0
    there, weights = (load_file(d / WEIGHTS) for d in (tmp_path / "out", directory))
    assert all(w.dtype == torch.bfloat16 and torch.equal(w, there[n]) for n, w in weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_releases_of_transformers_read_the_configuration(given, tmp_path, family):
    """Release 4 looks for rope_theta and rope_scaling at the top, and takes 10,000 and none where
    there are none; what it writes is read alike."""
    directory = given(family)
    convert("from-hf", directory, tmp_path / "run")
    convert("to-hf", tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    assert config["rope_theta"] == rope.pop("rope_theta")
    assert config["rope_scaling"] == (None if rope == {"rope_type": "default"} else rope)
    old = {key: value for key, value in config.items()
           if key not in ("rope_parameters", "dtype", "layer_types")}
    new = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    assert model_of(old, ALL) == model_of(new, ALL) == model_of(config, ALL)
    assert model_of(old, ALL).rotary_base == config["rope_theta"]


def test_llama_3_1_is_read_from_its_published_configuration():
    """As its repository has it, in release 4's form."""
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
        "vocab_size": 128256}
    wanted = ARCHITECTURES.get("llama")(preset="llama_3_1_8b")
    assert not model_of(config, ALL).differences(wanted)


REFUSED = {
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
                "rope_type='dynamic'"),
    "other constants": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor=2.0"),
    "other length": ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}},
                     "original_max_position_embeddings=4096"),
    "no factor": ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}},
                  "factor=None"),
    "two thetas": ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "says otherwise"),
    "theta of text": ({"rope_theta": "a lot"}, "rope_theta='a lot'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
                      "all layers rotate alike"),
    "bias": ({"attention_bias": True}, "attention_bias=True"),
    "biased mlp": ({"mlp_bias": True}, "mlp_bias=True"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "window": ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window=4096"),
    "used window": ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
                     "max_window_layers": 1}, "sliding_window=16"),
    "window by layer": ({"model_type": "qwen3", "layer_types": ["full_attention",
                                                                "sliding_attention"]},
                        "has sliding_attention"),
    "biased qwen3": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
    "no size": ({"hidden_size": None}, "hidden_size=None, where input should be a valid integer"),
    "no groups": ({"model_type": "qwen3", "num_key_value_heads": None},
                  "has no num_key_value_heads"),
    "groups": ({"num_key_value_heads": 3}, "model.heads=4 is not divisible by"),
    "odd heads": ({"head_dim": 15}, "model.head_width=15 is odd"),
    "mixture": ({"model_type": "qwen3_moe"}, "a mixture of experts"),
    "mixtral": ({"model_type": "mixtral"}, "a mixture of experts"),
    "gemma": ({"model_type": "gemma2"}, "norms multiply by 1 + weight"),
    "olmo": ({"model_type": "olmo2"}, "norms follow attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused_by_name(name):
    change, said = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        model_of(CONFIG | change, ALL)
    assert said in str(refused.value), refused.value


@pytest.mark.parametrize("change", [
    {}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}},
    {"model_type": "mistral", "sliding_window": None}, {"model_type": "mistral"},  # within 4096
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
     "max_window_layers": 2},
    {"model_type": "qwen3", "layer_types": ["full_attention"] * 2},
    {"partial_rotary_factor": 1.0}, {"rope_parameters": {"partial_rotary_factor": 1.0}},
    {"rope_scaling": LLAMA3 | {"factor": 1.0}},
    {"model_type": "mistral", "max_position_embeddings": 8192, "sliding_window": 8192},
    {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1,
     "max_position_embeddings": 8192, "sliding_window": 8192}])
def test_what_changes_nothing_is_read(change):
    read = model_of(CONFIG | change, ALL)
    assert (read.hidden, read.rotary_scaling) == (64, 1.0)


def test_what_a_configuration_leaves_out_is_what_transformers_takes():
    from transformers import LlamaConfig

    theirs = LlamaConfig()
    model = model_of({key: value for key, value in CONFIG.items()
                      if key not in ("rms_norm_eps", "tie_word_embeddings", "head_dim")}, ALL)
    assert (model.norm_eps, model.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert model.head_width * model.heads == model.hidden


def test_models_of_other_slices_are_compared(given, tmp_path):
    convert("from-hf", given("llama"), tmp_path / "run", "model.slices=4")
    (moved, _) = distances(open_weights(tmp_path / "given"), reader_of(tmp_path / "run"))
    assert list(moved) == ["W_Q", "W_K", "W_V", "W_D", "W_I gate", "W_I up", "W_O"]
    assert set(moved.values()) == {0.0}


@pytest.mark.slow
def test_a_recipe_may_follow_and_must_agree(given, tmp_path, capsys):
    directory = given("llama")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {dropout: 0.1}\nsparsity: 0.5\noptimizer: {lr: 1e-3}\n"
                      "train: {tokens: 1M, global_batch: 8, micro_batch: 2, precision: fp32}\n")
    assert convert("from-hf", directory, tmp_path / "run", "--recipe", recipe, "model.slices=4",
                   "--select", "magnitude") == 0
    run = reader_of(tmp_path / "run")
    assert (run.model.slices, run.model.dropout, run.plan.sparsity) == (4, 0.1, 0.5)
    largest = {n: w for n, w in run.weights.items() if w.linear}
    whole = open_weights(directory, like=run.model)
    for name in largest:
        kept = run.weight(name)
        assert torch.equal(kept, whole.weight(name) * (kept != 0)), name
    capsys.readouterr()
    for words, said in (
        (["model.hidden=128"], "model.hidden is 64 there and 128 in the recipe"),
        (["model.rotary_base=1e4"], "model.rotary_base is 500000.0 there and 10000.0"),
        (["model.tied=true"], "model.tied is False there and True"),
        (["model.rotary_scaling=1"], "model.rotary_scaling is 8.0 there and 1.0"),
        (["model.slices=3"], "slices may be [1, 2, 4]"),
        (["model.architecture=gpt"], "model.architecture is llama there and gpt"),
    ):
        assert convert("from-hf", directory, tmp_path / "no", "--recipe", recipe, *words) == 2
        assert said in capsys.readouterr().err, words
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_of_more_ids_than_rows_is_refused(given, tmp_path, capsys):
    assert convert("from-hf", given("llama", vocab_size=270), tmp_path / "run") == 2
    assert "knows 280 tokens and its model 270" in capsys.readouterr().err


def test_megatron_lm_gets_its_layout_and_arguments(given, tmp_path):
    convert("from-hf", given("qwen3"), tmp_path / "run")
    run = reader_of(tmp_path / "run")
    save_for_megatron(run, tmp_path / "megatron", torch.float32)
    back = MegatronReader(tmp_path / "megatron", run.model)
    assert all(torch.equal(back.weight(name)[:280], run.weight(name)[:280]) for name in run.weights)
    gates = back.tensor("decoder.layers.mlp.linear_fc1.weight")[0][:96]
    assert torch.equal(gates, load_file(tmp_path / "given" / WEIGHTS)[
        "model.layers.0.mlp.gate_proj.weight"])
    for word in ("--kv-channels 32", "--qk-layernorm", "--swiglu", "--normalization RMSNorm",
                 "--num-query-groups 2", "--rotary-base 1000000", "--norm-epsilon 1e-06",
                 "--untie-embeddings-and-output-weights", "--disable-bias-linear"):
        assert word in arguments(run)
    convert("from-hf", save_family("qwen2", tmp_path / "given"), tmp_path / "qwen2")
    assert "--add-qkv-bias" in arguments(reader_of(tmp_path / "qwen2"))


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.exists(), reason=NO_STORIES)
def test_a_trained_model_continues_its_documented_text_after_a_trip(tmp_path):
    """stories260K, with 43 gates a slice and a tokenizer that begins texts with <s>."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_stories(tmp_path / "stories")
    assert convert("from-hf", tmp_path / "stories", tmp_path / "run") == 0
    assert convert("to-hf", tmp_path / "run", tmp_path / "out") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == 260_032
    prompt = tokenizer("", return_tensors="pt")["input_ids"]
    assert prompt.tolist() == [[1]] and tokenizer.bos_token == "<s>"
    out = model.generate(prompt.long(), do_sample=False, max_new_tokens=215)[0]
    assert tokenizer.decode(out[1:]).startswith(TEXT)
    ours = load_tokenizer(tmp_path / "out")
    assert [1, *ours.encode(TEXT)] == tokenizer(TEXT)["input_ids"]


def test_the_beginning_of_texts_is_kept_where_a_tokenizer_adds_it(tokenizer, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made = Tokenizer.from_str(_as_json(tokenizer))
    made.add_special_tokens(["<|begin_of_text|>"])
    begin = made.token_to_id("<|begin_of_text|>")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>",
              "tokenizer_class": "PreTrainedTokenizerFast"}
    for adds in (False, True):
        directory = tmp_path / str(adds)
        directory.mkdir()
        if adds:
            made.post_processor = TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])
        made.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        loaded = load_tokenizer(directory)
        assert loaded.begin_token == ("<|begin_of_text|>" if adds else None)
        assert loaded.bod == (begin if adds else loaded.eod)
        assert begin not in loaded.encode("a <|begin_of_text|>")
        loaded.save(tmp_path / f"{adds} saved")
        assert load_tokenizer(tmp_path / f"{adds} saved").begin_token == loaded.begin_token
        (tmp_path / f"{adds} out").mkdir()
        _save_tokenizer(SimpleNamespace(tokenizer=loaded, model=SimpleNamespace(max_positions=32)),
                        tmp_path / f"{adds} out")
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{adds} out")
        assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|endoftext|>")
        assert theirs("a b")["input_ids"] == [begin] * adds + loaded.encode("a b")


def _as_json(directory: Path) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE.from_file(str(directory / "vocab.json"),
                                          str(directory / "merges.txt")))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return made.to_str()
