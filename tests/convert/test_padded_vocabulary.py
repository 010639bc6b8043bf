"""Models of more rows than their tokenizer has ids, as published vocabularies are padded: taken
everywhere, and no text is ever made of what is no token."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_recipe, make_tokenizer, write_gpt2

from megatron_spdf.checkpoint.reader import CheckpointReader
from megatron_spdf.convert.huggingface_export import export, in_memory
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.source import open_weights, tokenizer_of
from megatron_spdf.data.finetuning.task import Example
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.pretraining.corpus import check_corpus, data_tokenizer
from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer
from megatron_spdf.evaluation.decoding import DecodingSettings, decode, likelihood
from megatron_spdf.evaluation.evaluate import evaluate, scores_of
from megatron_spdf.resilience.world import find_ranks

sys.path.insert(0, str(Path(__file__).parents[1]))
from huggingface_models import SHAPES, logits_of, make_gpt2  # noqa: E402

IDS, ROWS, FAVORITE = 260, 301, 290  # of these the model likes the last best, and it is no token
TEXTS = ["one two three four five six seven eight nine ten " * 9]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with `model`, whose best next token is always a row that pads its vocabulary,
    and `data` of its tokenizer."""
    place = tmp_path_factory.mktemp("padded")
    make_gpt2("narrow").save_pretrained(place / "model")
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.wte.weight"][FAVORITE] = 3 * torch.sign(torch.randn(SHAPES["narrow"][1]))
    tensors["transformer.ln_f.bias"] += tensors["transformer.wte.weight"][FAVORITE]
    save_file(tensors, file, {"format": "pt"})
    tokenizer = train_tokenizer("bpe", TEXTS, IDS, place / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (place / "model" / name).write_bytes((place / "tokenizer" / name).read_bytes())
    (place / "text.txt").write_text(TEXTS[0])
    preprocess([place / "text.txt"], place / "data", tokenizer, text_key="text", on_error="stop",
               progress=False)
    return place


@pytest.fixture
def recipe(place):
    shape = dict(zip(("layers", "hidden", "heads", "ffn_hidden"), SHAPES["narrow"], strict=False))
    return make_recipe(model={**shape, "vocab_size": ROWS, "max_positions": 32},
                       train={"sequence_length": 32, "tokens": 128, "global_batch": 1,
                              "precision": "fp32"},
                       data={"train": [str(place / "data")], "valid": []})


def test_a_run_begins_with_them_and_goes_on(place, recipe, tmp_path):
    source = open_weights(place / "model")
    run = tmp_path / "run"
    write_initial_checkpoint(source, recipe, data_tokenizer(recipe), run)
    reader = CheckpointReader(run / "checkpoints" / "step_00000000")
    assert all(torch.equal(reader.master(name), source.master(name)) for name in source.weights)
    assert check_corpus(reader.recipe).tokenizer.vocab_size == IDS
    export(reader, tmp_path / "exported")
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(logits_of(tmp_path / "exported", ids), logits_of(place / "model", ids))
    written = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert written["suppress_tokens"] == list(range(IDS, ROWS))


@pytest.mark.parametrize("rows, taken", [
    (IDS - 1, False), (IDS, True), (ROWS, True), (2 * IDS, True), (IDS + 4096, True),
    (IDS + 4097, False), (50257, False)])
def test_the_vocabulary_of_a_recipe_may_be_padded_but_not_another(recipe, rows, taken):
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(
        update={"vocab_size": rows})})
    if taken:
        assert data_tokenizer(recipe).vocab_size == IDS
        return
    with pytest.raises(ValueError, match=f"model.vocab_size={rows}, .* knows 260 tokens; set "
                                         "model.vocab_size=260"):
        data_tokenizer(recipe)


def test_no_remedy_leads_in_a_circle(place, recipe, tmp_path):
    """What a refusal says is what the next one takes."""
    source = open_weights(place / "model")
    small = recipe.model_copy(update={"model": recipe.model.model_copy(
        update={"vocab_size": IDS})})
    with pytest.raises(ValueError, match=f"model.vocab_size is {ROWS} there and {IDS} in the "
                                         "recipe.*Set these to what is there"):
        write_initial_checkpoint(source, small, data_tokenizer(small), tmp_path / "run")
    write_initial_checkpoint(source, recipe, data_tokenizer(recipe), tmp_path / "run")


def test_another_end_of_texts_in_the_configuration_is_said(place, tmp_path, caplog):
    for name in ("model.safetensors", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((place / "model" / name).read_bytes())
    config = json.loads((place / "model" / "config.json").read_text())
    for end, said in ((IDS - 1, False), (5, True), ([5, IDS - 1], False), (None, False)):
        caplog.clear()
        (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
        assert open_weights(tmp_path).tokenizer.eod == IDS - 1
        assert ("ends texts with the id 5, and the tokenizer documents with '<|endoftext|>'"
                in caplog.text) == said


def test_data_of_another_tokenizer_are_not_the_models(place, tmp_path, recipe):
    """More ids than the model has rows: neither number is set, the data are."""
    directory = write_gpt2(tmp_path / "small")
    with pytest.raises(ValueError, match="has 259 rows for tokens.*260 ids.*Preprocess the data"):
        write_initial_checkpoint(open_weights(directory), recipe, data_tokenizer(recipe),
                                 tmp_path / "run")


@torch.no_grad()
def greedy(model, ids: list[int], steps: int) -> list[int]:
    """One token after another, of those that are tokens."""
    new: list[int] = []
    for _ in range(steps):
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1, :IDS].argmax()))
    return new


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_no_token_is_never_decoded(place, monkeypatch, beams):
    source = open_weights(place / "model")
    model, tokenizer = in_memory(source), source.tokenizer
    prompt = [*tokenizer.encode("one two"), tokenizer.eod]
    with torch.no_grad():
        assert int(model(torch.tensor([prompt])).logits[0, -1].argmax()) == FAVORITE
    decoded = []
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.extend(ids) or "")
    decode(model, tokenizer, ["one two"],
           DecodingSettings(beams=beams, max_new_tokens=6, no_repeat_ngram=0))
    assert decoded and max(decoded) < IDS
    if beams == 1:
        assert decoded == greedy(model, prompt, len(decoded))


def test_they_count_in_perplexity_as_in_transformers(place):
    source = open_weights(place / "model")
    model, tokenizer = in_memory(source), source.tokenizer
    ids = [*tokenizer.encode("one"), tokenizer.eod, *tokenizer.encode(" two"), tokenizer.eod]
    with torch.no_grad():
        logits = torch.log_softmax(model(torch.tensor([ids])).logits, -1)[0]  # (T, ROWS)
    first = len(tokenizer.encode("one"))
    nats = -sum(float(logits[t, ids[t + 1]]) for t in range(first, len(ids) - 1))
    assert likelihood(model, tokenizer, [("one", "two")]).nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_ids_without_a_token_are_text_too(tmp_path, kind):
    tokenizer = train_tokenizer(kind, TEXTS, 290, tmp_path / kind)
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    assert tokenizer.decode([*one, 290, *two, 99999, -1]) == "one\ufffdtwo\ufffd\ufffd"
    assert tokenizer.decode([290]) == "\ufffd"
    assert tokenizer.text_bytes([*one, tokenizer.eod, *two]) == 6
    assert tokenizer.text_bytes([*one, 290, *two]) in (6, 9)


def test_a_tokenizer_of_more_ids_than_rows_is_refused(tmp_path):
    directory = write_gpt2(tmp_path / "model")
    for name, content in zip(("vocab.json", "merges.txt"), make_tokenizer(3)._files, strict=True):
        (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer knows 260 tokens and its model 259; they do "
                                         "not belong together"):
        tokenizer_of(open_weights(directory))


@pytest.mark.parametrize("factor", [3e4, 3e38])
def test_a_diverged_model_has_no_perplexity(place, tmp_path, factor):
    from megatron_spdf.evaluation.scores import render
    from megatron_spdf.evaluation.scores_file import describe, write_scores

    source = open_weights(place / "model")
    weight = source.weight
    source.weight = lambda name: weight(name) * (factor if "final_layernorm.w" in name else 1)
    settings = DecodingSettings(beams=2, max_new_tokens=3)
    examples = [Example(f"context {n}", (f"completion {n}",)) for n in range(3)]
    scores = scores_of("jsonl", examples,
                       evaluate(source, "jsonl", examples, settings, find_ranks()))
    assert "the model has diverged" in scores.missing["perplexity"]
    assert f"perplexity  {'-':>8}".split() == [line.split() for line in render(scores).splitlines()
                                               if line.startswith("perplexity ")][0]
    assert "perplexity: missing (the loss is" in render(scores)
    write_scores(tmp_path / "scores", describe("jsonl", "test", scores))

    def refuse(word):
        raise AssertionError(word)

    written = json.loads((tmp_path / "scores" / "scores.json").read_text(), parse_constant=refuse)
    assert written["scores"]["all"]["perplexity"] is None
    scores.values["all"]["perplexity"] = 1.25e249
    assert "perplexity  1.250000e+249" in render(scores)
