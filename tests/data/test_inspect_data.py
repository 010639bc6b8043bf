"""tools/inspect_data.py: what is there, and every byte that is not as it was written."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from text_shards import ROOT, documents_of, records, write_shard

from megatron_spdf.data.indexed.inspect import describe, histogram, sample, verify, verify_corpus
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    module = importlib.import_module("inspect_data")
    sys.path.remove(str(ROOT / "tools"))
    return module


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tiny_bpe) -> Path:
    """Data set "one" of two inputs, and the directory "parts" of data sets."""
    directory = tmp_path_factory.mktemp("pristine")
    paths = [write_shard(directory / f"{i}.jsonl", records(60, seed=i)) for i in range(2)]
    preprocess(paths, directory / "one", load_tokenizer(tiny_bpe))
    preprocess(paths, directory / "parts", load_tokenizer(tiny_bpe), split=(8, 2),
               set_key="pile_set_name")
    return directory


@pytest.fixture
def place(pristine, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(pristine, tmp_path / "copy")
    return tmp_path / "copy"


def test_facts_are_those_of_the_documents(pristine):
    lengths = [len(ids) for ids in documents_of(pristine / "one")]
    facts = describe(pristine / "one")
    spread = facts["tokens_per_document"]
    assert (spread["min"], spread["max"]) == (min(lengths), max(lengths))
    assert spread["mean"] == pytest.approx(np.mean(lengths)) and spread["50%"] == np.median(lengths)
    assert sum(c["documents"] for c in facts["histogram"]) == 120
    assert sum(c["tokens"]
               for c in facts["histogram"]) == sum(lengths) == facts["manifest"]["tokens"]


def test_ids_of_another_tokenizer_are_a_fault_though_each_is_known(pristine, tiny_bpe):
    own = load_tokenizer(tiny_bpe)
    assert verify(pristine / "one", own) == [] == verify_corpus(pristine / "parts", own)
    other = SimpleNamespace(sha256="f" * 64, vocab_size=own.vocab_size)
    (found,) = verify(pristine / "one", other)
    assert f"was made with the tokenizer {own.sha256}, and the run uses {'f' * 64}" in found
    for found in verify_corpus(pristine / "parts", other):
        assert f"was made with the tokenizer {own.sha256}" in found
    assert verify_corpus(pristine / "parts", other)


def test_classes_of_the_histogram():
    assert histogram(np.array([0, 0, 1], np.int32)) == [
        {"from": 0, "below": 1, "documents": 2, "tokens": 0},
        {"from": 1, "below": 2, "documents": 1, "tokens": 1}]
    assert histogram(np.array([1, 2, 3, 4, 7, 8, 1023, 1024], np.int32)) == [
        {"from": 1, "below": 2, "documents": 1, "tokens": 1},
        {"from": 2, "below": 4, "documents": 2, "tokens": 5},
        {"from": 4, "below": 8, "documents": 2, "tokens": 11},
        {"from": 8, "below": 16, "documents": 1, "tokens": 8},
        *({"from": 2**i, "below": 2 ** (i + 1), "documents": 0, "tokens": 0} for i in range(4, 9)),
        {"from": 512, "below": 1024, "documents": 1, "tokens": 1023},
        {"from": 1024, "below": 2048, "documents": 1, "tokens": 1024}]


@pytest.mark.parametrize("number", [0, 59, 60, 119])
def test_a_sample_is_the_document_with_its_input(pristine, number):
    found = sample(pristine / "one", number)
    assert found["text"] == records(60, seed=number // 60)[number % 60]["text"] + "<|endoftext|>"
    assert found["source"] == str(pristine / f"{number // 60}.jsonl")


def test_what_was_written_is_verified(pristine):
    assert verify(pristine / "one") == [] and verify_corpus(pristine / "parts") == []


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("suffix", "share", "said"), [
    ("bin", 0.1, r"tokens 0 to [\d,]+: another content than was made of .*/0.jsonl"),
    ("bin", 0.9, r"tokens [\d,]+ to [\d,]+: another content than was made of .*/1.jsonl"),
    ("idx", 0.2, "its offsets do not follow from its lengths"),
    ("idx", 0.6, "its offsets do not follow from its lengths"),
    ("idx", 0.9, "one.idx has another content than was written"),
])
def test_a_flipped_bit_is_found(place, suffix, share, said):
    path = place / f"one.{suffix}"
    flip(path, int(path.stat().st_size * share) // 8 * 8 + 2)
    assert any(re.search(said, fault) for fault in verify(place / "one")), verify(place / "one")


def change_manifest(prefix: Path, **values) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def test_other_damage_is_found(place, tiny_bpe):
    tokenizer = json.loads((place / "one.json").read_bytes())["tokenizer"]
    change_manifest(place / "one", tokenizer={**tokenizer, "vocab_size": 250})
    assert any(re.search(r"id 2\d\d, and the tokenizer has the ids 0 to 249", fault)
               for fault in verify(place / "one"))
    change_manifest(place / "one", tokenizer={**tokenizer, "eod": 7})
    assert any("document 0 does not end with one" in fault for fault in verify(place / "one"))
    change_manifest(place / "one", tokenizer={**tokenizer, "sha256": "0" * 64})
    assert any("the manifest says 000000" in fault for fault in verify(place / "one"))
    change_manifest(place / "one", tokenizer=tokenizer, tokens=5)
    assert any("one.json says 5" in fault for fault in verify(place / "one"))
    (place / "one.bin").write_bytes(b"xx")
    assert len(verify(place / "one")) == 1 and "one.bin is cut off" in verify(place / "one")[0]


@pytest.mark.parametrize(("unknown", "found"), [("bin_sha256", True), ("tokens", False)])
def test_a_source_of_which_something_is_unknown_moves_no_other(place, unknown, found):
    first, second = json.loads((place / "one.json").read_bytes())["sources"]
    change_manifest(place / "one", sources=[{**first, unknown: None}, second])
    assert verify(place / "one") == []
    flip(place / "one.bin", (place / "one.bin").stat().st_size * 9 // 10 // 8 * 8 + 2)
    assert any(f"tokens {first['tokens']:,} to" in fault
               for fault in verify(place / "one")) == found


def test_a_directory_must_add_up(place):
    path = place / "parts" / "corpus.json"
    corpus = json.loads(path.read_bytes())
    path.write_text(json.dumps({**corpus, "documents": 121}))
    assert verify_corpus(place / "parts") == [
        f"{place / 'parts'}: the data sets hold 120 documents together, and corpus.json says 121"]
    Path(place / "parts" / "train" / "github.bin").unlink()
    assert any("train/github.bin" in fault for fault in verify_corpus(place / "parts"))


def test_the_tool_tells_draws_and_verifies(pristine, tmp_path, tool, capsys):
    words = ["--sample", "3", "--png", str(tmp_path / "h.png"), "--verify"]
    assert tool.main([str(pristine / "one"), *words]) == 0
    out = capsys.readouterr().out
    for said in ("120 documents", "gpt2-bpe of 300 ids", "2 inputs; 0 records skipped",
                 "tokens a document: mean",
                 f"from {pristine}/0.jsonl:\n{records(60)[3]['text']}", "verified: every byte"):
        assert said in out
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert tool.main([str(pristine / "one"), *words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sample"]["document"] == 3 and facts["faults"] == []
    assert facts["data_sets"][0]["manifest"]["documents"] == 120
    assert tool.main([str(pristine / "parts"), "--verify"]) == 0
    assert capsys.readouterr().out.count("part of a corpus:") == 6


def test_a_directory_without_a_list_is_its_data_sets_and_one_that_is_damaged_hides_no_other(
        place, tool, capsys):
    (place / "parts/corpus.json").unlink()
    inner = place / "parts/train"
    assert tool.main([str(inner), "--verify"]) == 0
    out = capsys.readouterr().out
    names = sorted(path.stem for path in inner.glob("*.idx"))
    assert len(names) == 3 and all(f"{inner}/{name}" in out for name in names)
    (inner / "github.bin").write_bytes(b"x")
    for words in ([], ["--verify"]):
        assert tool.main([str(inner), *words]) == 2
        out, err = capsys.readouterr()
        assert f"{inner}/{names[-1]}" in out and err.count("github.bin") == 1
    for path in inner.glob("*.bin"):
        path.write_bytes(b"x")
    assert tool.main([str(inner)]) == 2
    out, err = capsys.readouterr()
    assert not out and all(f"{name}.bin" in err for name in names)


def test_the_tool_reads_what_another_tool_made(place, tool, capsys):
    (place / "one.json").unlink()
    shutil.rmtree(place / "one.tokenizer")
    assert tool.main([str(place / "one"), "--verify"]) == 0
    assert "no manifest: made by another tool" in capsys.readouterr().out
    assert tool.main([str(place / "one"), "--sample", "0"]) == 2
    assert "one.tokenizer is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["nosuch"], "error: data set nosuch has no file nosuch.bin"),
    (["one.bin"], "The prefix of that file is one; write it so, or make the data set with"),
    (["one.idx", "--sample", "1"], "The prefix of that file is one; write it so"),
    (["one.json"], "data set one.json has no file one.json.bin. Correct the prefix"),
    (["one/"], "There is a data set one, without the /; write it so, or make"),
    (["none/"], "data set none/ has no file none/.bin. Correct the prefix"),
    (["one", "--sample", "120"], "documents 0 to 119; there is no document 120"),
    (["parts", "--png", "x.png"], "holds 6 data sets; name one for --sample or --png"),
])
def test_bad_input(pristine, tool, capsys, monkeypatch, words, said):
    monkeypatch.chdir(pristine)
    assert tool.main(words) == 2
    assert said in capsys.readouterr().err


def test_damage_is_exit_code_2(place, tool, capsys):
    flip(place / "one.bin", 1000)
    assert tool.main([str(place / "one"), "--verify"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "another content than was made of" in err
