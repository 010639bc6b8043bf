"""A chat model's template, and the tokens of its turns, come through a run and out again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from byte_tokenizers import write_byte_tokenizer
from small_models import gpt2_tensors, make_recipe, write_gpt2

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_export import export
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights, richer_of
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}")
CHAT = [{"role": "user", "content": "Hi \u00fc"}]


@pytest.fixture
def model(tmp_path):
    """A GPT-2 with SmolLM2's customs: documents end with <|endoftext|>, turns with <|im_end|>, and
    <|im_start|> is declared as the beginning and never put there."""
    tensors = gpt2_tensors()
    tensors["transformer.wte.weight"] = torch.randn(259, 12, generator=torch.Generator())
    directory = write_gpt2(tmp_path / "model", tensors, bos_token_id=1, eos_token_id=2)
    write_byte_tokenizer(directory, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                         "<|im_start|>", "<|im_end|>")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def test_a_chat_goes_on_after_a_trip(model, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    source = open_weights(model)
    recipe = make_recipe(sparsity=0.5, train={"precision": "fp32"})
    write_initial_checkpoint(source, recipe, source.tokenizer, tmp_path / "run", "magnitude")
    run = CheckpointReader(find_checkpoint(tmp_path / "run"))
    assert (run.tokenizer.eod, run.tokenizer.bod) == (0, 0)  # of documents, as training has them
    export(run, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "out"))
    assert (after.bos_token, after.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = [made.apply_chat_template(CHAT, tokenize=True, return_dict=False)
            for made in (before, after)]
    assert chat[0] == chat[1] and chat[1][0] == 1 and chat[1][-2] == 2
    said = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (said.bos_token_id, said.eos_token_id, said.pad_token_id) == (1, [0, 2], 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [0, 2])
    again = open_weights(tmp_path / "out").tokenizer  # as it came
    assert (again.prefix, again.ends, again.declared) == (1, [0, 2], dict(
        bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE))


def test_every_template_and_every_end_of_a_text_is_kept(model, tmp_path):
    """As Llama 3.1 has them: calls of tools have a template and an end of their own."""
    from transformers import AutoTokenizer, GenerationConfig

    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}" + TEMPLATE)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 5, 1, "x", 999]}')
    source = open_weights(model)
    assert source.tokenizer.ends == [5, 1, 0, 2]  # last that of a turn
    write_initial_checkpoint(source, make_recipe(), source.tokenizer, tmp_path / "run", "random")
    export(CheckpointReader(find_checkpoint(tmp_path / "run")), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {
        "default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}
    assert set(GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == {0, 1, 2, 5}
    assert open_weights(tmp_path / "out").tokenizer.declared == source.tokenizer.declared


def test_the_tokenizer_beside_the_data_does_not_hide_what_the_models_declares(model, tmp_path):
    source = open_weights(model)
    (tmp_path / "data").mkdir()
    shutil.copy(model / "tokenizer.json", tmp_path / "data")
    beside = load_tokenizer(tmp_path / "data")
    assert beside == source.tokenizer and not beside.declared
    assert richer_of(beside, source).declared == source.tokenizer.declared != {}
    (tmp_path / "other").mkdir()
    write_byte_tokenizer(tmp_path / "other", ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>")
    other = load_tokenizer(tmp_path / "other")
    assert richer_of(other, source) is other


def test_one_end_of_generation_may_be_a_default_and_means_nothing(model):
    (model / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(model).ends == [0, 2]


@pytest.mark.parametrize(("name", "said", "declared"), [
    ("tokenizer_config.json", {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"},
                               "chat_template": "x"},
     {"eos_token": "<|im_end|>", "chat_template": "x"}),
    ("tokenizer_config.json", {"eos_token": "no such token", "chat_template": [{}]}, {}),
    ("declared.json", {"ends": ["no such token", 5, [], "<|endoftext|>"]}, {}),
    ("declared.json", {"ends": 5, "chat_template": []}, {}),
    ("declared.json", {"bos_token": "no such token", "eos_token": "<|im_end|>", "other": 1},
     {"eos_token": "<|im_end|>"}),
])
def test_what_is_declared_and_means_nothing_is_left_out(model, name, said, declared):
    (model / "chat_template.jinja").unlink()
    (model / name).write_text(json.dumps(said))
    assert load_tokenizer(model).declared == declared
