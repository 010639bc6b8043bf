"""Directories that describe a tokenizer more than once: the description that says most is taken,
and a difference is said."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from small_models import make_recipe, write_gpt2
from tokenizers import decoders, models, pre_tokenizers

from megatron_spdf.convert.source import open_weights
from megatron_spdf.data.indexed.inspect import verify
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer

TEXTS = ["one two three four five six seven eight nine ten", "a line\nand another </s> <pad>"] * 9


@pytest.fixture
def place(tmp_path):
    """A directory with vocab.json and merges.txt of 280 ids."""
    train_tokenizer("bpe", TEXTS, 280, tmp_path / "model")
    return tmp_path / "model"


def describe(place, *more: str) -> tokenizers.Tokenizer:
    """tokenizer.json of the same BPE, with more special tokens."""
    made = tokenizers.Tokenizer(models.BPE.from_file(str(place / "vocab.json"),
                                                     str(place / "merges.txt")))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", *more])
    made.save(str(place / "tokenizer.json"))
    return made


def sentence_piece(place, size: int) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=size, model_type="bpe",
        hard_vocab_limit=False, byte_fallback=size > 256, minloglevel=2)
    (place / "tokenizer.model").write_bytes(model.getvalue())


def test_equal_descriptions_are_one_and_nothing_is_said(place, caplog):
    alone = load_tokenizer(place)
    describe(place)
    both = load_tokenizer(place)
    assert (both.kind, both.sha256) == ("gpt2-bpe", alone.sha256) and not caplog.text


def test_tokenizer_json_of_more_tokens_goes_before_gpt2s_files(place, caplog):
    described = describe(place, "<pad>", "<sep>")
    tokenizer = load_tokenizer(place)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("tokenizers", 282)
    assert tokenizer.encode(TEXTS[0]) == described.encode(TEXTS[0]).ids
    assert "one of 282 and one of 280 ids; tokenizer.json is used, and not vocab.json" in (
        caplog.text)


def test_of_two_of_one_size_tokenizer_json_counts(place, tmp_path, caplog):
    train_tokenizer("bpe", [text.upper() for text in TEXTS], 280, tmp_path / "other")
    described = describe(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").rename(place / "tokenizer.json")
    text = "THREE three"
    assert load_tokenizer(place).encode(text) == described.encode(text).ids
    assert "describes two tokenizers" in caplog.text
    assert "tokenizer.json is used, and not vocab.json" in caplog.text


def test_gpt2s_files_of_more_tokens_go_before_an_older_tokenizer_json(place, tmp_path, caplog):
    train_tokenizer("bpe", TEXTS, 270, tmp_path / "older")
    describe(tmp_path / "older")
    (tmp_path / "older" / "tokenizer.json").rename(place / "tokenizer.json")
    assert load_tokenizer(place).vocab_size == 280
    assert "one of 280 and one of 270 ids; vocab.json is used, and not tokenizer.json" in (
        caplog.text)


def test_two_that_end_documents_by_one_text_of_two_ids_are_not_one(place, caplog):
    describe(place)
    described = json.loads((place / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, last = vocabulary["<|endoftext|>"], vocabulary["~"]
    vocabulary |= {"<|endoftext|>": last, "~": first}
    (token,) = described["added_tokens"]
    token["id"] = last
    (place / "tokenizer.json").write_text(json.dumps(described))
    assert load_tokenizer(place).eod == last
    assert (f"one ends documents with '<|endoftext|>', id {last}, and one with '<|endoftext|>', "
            f"id {first}; tokenizer.json is used") in caplog.text


@pytest.mark.parametrize("size, kind", [(60, "gpt2-bpe"), (295, "sentencepiece")])
def test_a_sentencepiece_model_beside_them(place, caplog, size, kind):
    sentence_piece(place, size)
    assert load_tokenizer(place).kind == kind
    assert "describes two tokenizers" in caplog.text


def test_a_llama_directory_has_both_and_they_agree(tmp_path, caplog):
    """tokenizer.json that transformers made of a tokenizer.model, as in most published models."""
    from transformers import LlamaTokenizer

    (tmp_path / "sp").mkdir()
    train_tokenizer("sentencepiece", TEXTS, 330, tmp_path / "sp" / "one")
    (tmp_path / "sp" / "one" / "tokenizer.model").rename(tmp_path / "sp" / "tokenizer.model")
    (tmp_path / "sp" / "one").rmdir()
    alone = load_tokenizer(tmp_path / "sp")
    made = LlamaTokenizer.from_pretrained(tmp_path / "sp", add_prefix_space=False)
    made.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").write_bytes(
        (tmp_path / "sp" / "tokenizer.model").read_bytes())
    caplog.clear()
    both = load_tokenizer(tmp_path / "both")
    assert both.kind == "tokenizers" and (both.vocab_size, both.eod) == (alone.vocab_size,
                                                                       alone.eod)
    assert all(both.encode(text) == alone.encode(text) for text in TEXTS)
    assert "describes two" not in caplog.text


def test_two_tokens_of_one_id_are_refused(place):
    """Both would be decoded to one of them."""
    describe(place)
    file = place / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"]["a"] = described["model"]["vocab"]["b"]
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="tokenizer.json gives 'a' and 'b' the id"):
        load_tokenizer(place)


def test_a_damaged_tokenizer_json_is_not_passed_over(place):
    (place / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(place)


@pytest.mark.parametrize("name", ["tokenizer.json", "end_of_document.txt"])
def test_a_pipe_is_refused_and_not_waited_for(place, name):
    os.mkfifo(place / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        load_tokenizer(place)


def test_links_are_read_as_hugging_faces_cache_has_them(place, tmp_path):
    (tmp_path / "linked").mkdir()
    for file in place.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert load_tokenizer(tmp_path / "linked").sha256 == load_tokenizer(place).sha256


def test_files_that_only_tokenizer_json_makes_sense_of(place):
    """RoBERTa's kind: ids in another order than merges."""
    vocab = json.loads((place / "vocab.json").read_bytes())
    (place / "vocab.json").write_text(json.dumps({t: 279 - i for t, i in vocab.items()}))
    describe(place)
    assert load_tokenizer(place).kind == "tokenizers"


def test_the_end_of_documents_that_transformers_configures(place, caplog):
    description = json.loads(describe(place, "<end>").to_str())
    for token in description["added_tokens"]:
        token["content"] = token["content"].replace("<|endoftext|>", "<start>")
    description["model"]["vocab"] = {token.replace("<|endoftext|>", "<start>"): i for token, i in
                                     description["model"]["vocab"].items()}
    for name in ("vocab.json", "merges.txt"):
        (place / name).unlink()
    (place / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="no end-of-document token.*--end-of-document"):
        load_tokenizer(place)
    for eos in ("<end>", {"content": "<end>", "__type": "AddedToken"}):
        (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(place).end_token == "<end>"
    assert load_tokenizer(place, "<start>").end_token == "<start>"


@pytest.mark.parametrize("named", [
    {"tokenizer_config.json": "<end>"}, {"special_tokens_map.json": "<end>"},
    {"special_tokens_map.json": {"content": "<end>"}, "tokenizer_config.json": "<|endoftext|>"},
    {"special_tokens_map.json": "<end>", "tokenizer_config.json": "<end>"}], ids=str)
def test_another_end_of_documents_in_the_configuration_is_said(place, caplog, named):
    describe(place, "<end>")
    for name, eos in named.items():
        (place / name).write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(place).end_token == "<|endoftext|>"
    file = next(name for name, eos in reversed(named.items()) if eos != "<|endoftext|>")
    assert f"documents end with '<|endoftext|>', and {file} says '<end>'" in caplog.text
    assert caplog.text.count("documents end") == 1
    (place / "end_of_document.txt").write_text("<end>\n")
    caplog.clear()
    assert load_tokenizer(place).end_token == "<end>" and "documents end" not in caplog.text


def test_tokens_that_a_separate_file_adds_are_said(place, caplog):
    (place / "added_tokens.json").write_text(json.dumps({"<pad>": 280, "<|endoftext|>": 279}))
    assert load_tokenizer(place).vocab_size == 280
    assert "added_tokens.json adds '<pad>', which the files beside it do not have" in caplog.text


def test_the_end_of_documents_is_named_once_and_goes_along(place, tmp_path, capsys):
    """From preprocessing to the data set's own copy, and from there to a run."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import preprocess_data

    describe(place, "<end>")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    words = ["--input", str(tmp_path / "text.jsonl"), "--tokenizer", str(place), "--workers", "1"]
    for name, more in (("usual", []), ("named", ["--end-of-document", "<end>"])):
        assert preprocess_data.main([*words, "--output", str(tmp_path / name), *more]) == 0
    facts = {name: json.loads((tmp_path / f"{name}.json").read_text())["tokenizer"]
             for name in ("usual", "named")}
    assert (facts["usual"]["eod"], facts["named"]["eod"]) == (279, 280)
    assert list(verify(tmp_path / "named")) == []

    def tokenizer_of(data: str, **more: str) -> int:
        recipe = make_recipe(model={"vocab_size": 281},
                             data={"train": [str(tmp_path / data)], "valid": [], **more})
        return check_corpus(recipe).tokenizer.eod

    assert (tokenizer_of("usual"), tokenizer_of("named")) == (279, 280)
    assert tokenizer_of("named", tokenizer=str(place), end_of_document="<end>") == 280
    for data, more in (("named", {"tokenizer": str(place)}),
                       ("usual", {"end_of_document": "<end>"})):
        with pytest.raises(ValueError, match="was made with the tokenizer"):
            tokenizer_of(data, **more)
    with pytest.raises(SystemExit):
        preprocess_data.main([*words, "--output", str(tmp_path / "x"), "--train-tokenizer", "bpe",
                              "--vocab-size", "300", "--end-of-document", "<end>"])
    assert preprocess_data.main([*words, "--output", str(tmp_path / "x"), "--end-of-document",
                                 "<ent>"]) == 2
    assert "no token '<ent>' to end documents with; those most like it: ['<end>'" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"),
                                   ("spiece.model",), ("tokenizer.json",)])
def test_every_name_of_a_tokenizers_files_counts_in_a_model(place, tmp_path, names):
    model = write_gpt2(tmp_path / "gpt2")
    assert open_weights(model).tokenizer is None and not tokenizer_files(model)
    if len(names) == 2:
        files = [place / "vocab.json", place / "merges.txt"]
    elif names[0].endswith("json"):
        describe(place)
        files = [place / "tokenizer.json"]
    else:
        sentence_piece(place, 300)
        files = [place / "tokenizer.model"]
    for file, name in zip(files, names, strict=True):
        (model / name).write_bytes(file.read_bytes())
    assert [file.name for file in tokenizer_files(model)] == sorted(names)
    assert open_weights(model).tokenizer is not None
