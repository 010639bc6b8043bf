"""Splits, sets, shards apart, duplicates, normalization: every document is where it belongs,
once."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter

import numpy as np
import pytest
from text_shards import ROOT, SETS, as_jsonl, content, documents_of, records, write_shard

from megatron_spdf.data.indexed.manifest import check_prefix, read_corpus
from megatron_spdf.data.preprocess import finalize
from megatron_spdf.data.preprocess.deduplicate import DigestSet
from megatron_spdf.data.preprocess.encode import Encoded
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer

sys.path.insert(0, str(ROOT / "tools"))
from preprocess_data import parse_shares, summarize  # noqa: E402

# Texts that are not for training, of 24 shared out 2 : 1 : 1, by their SHA-256.
STORED = {"valid": [0, 1, 2, 4, 5, 8, 9, 16, 23], "test": [22]}
NAMES = {"Pile-CC": "pile_cc", "Wikipedia (en)": "wikipedia_en", "Github": "github"}


@pytest.fixture(scope="module")
def tokenizer(tiny_bpe):
    return load_tokenizer(tiny_bpe)


def texts_of(tokenizer, prefix) -> list[str]:
    return [tokenizer.decode(ids[:-1]) for ids in documents_of(prefix)]


def test_a_split_is_by_text_alone_and_loses_nothing(tmp_path, tokenizer):
    items = records(600)
    one = write_shard(tmp_path / "a.jsonl", items[:300])
    two = write_shard(tmp_path / "b.jsonl", items[300:])
    preprocess([one], tmp_path / "few", tokenizer, split=(80, 15, 5))
    corpus = preprocess([two, one], tmp_path / "more", tokenizer, split=(80, 15, 5))
    few = {name: texts_of(tokenizer, tmp_path / "few" / name)
           for name in ("train", "valid", "test")}
    more = {name: texts_of(tokenizer, tmp_path / "more" / name)
            for name in ("train", "valid", "test")}
    assert sum(map(Counter, more.values()), Counter()) == Counter(item["text"] for item in items)
    for name, there in few.items():
        assert set(there) <= set(more[name])
    assert not set(more["train"]) & set(more["valid"]) and not set(more["train"]) & set(
        more["test"]
    )
    shares = [corpus.data_sets[name].documents / 600 for name in ("train", "valid", "test")]
    # Binomial: the standard deviation of the largest share is 1.6% of 600 documents, repeated texts
    #     apart.
    assert shares == pytest.approx([0.80, 0.15, 0.05], abs=0.07)


def test_a_split_without_a_document_is_said(tmp_path, tokenizer):
    write_shard(tmp_path / "a.jsonl", [{"text": "one text"}])
    corpus = preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, split=(98, 1, 0))
    (there,) = corpus.data_sets
    (other,) = {"train", "valid"} - {there}
    assert f"  {other}: no document, so that there is no such data set; give it a larger" in (
        summarize("t", corpus, 1.0))
    assert "test" not in summarize("t", corpus, 1.0)


@pytest.mark.parametrize("shares", ["a,b", "1,2,", "0,9;0,1", "", "1", "1,1,1,1", "nan,1", "0,1"])
def test_shares_that_are_none_are_refused_with_an_example(shares):
    with pytest.raises(argparse.ArgumentTypeError, match="write for example 98,1,1"):
        parse_shares(shares)


def test_the_split_of_a_text_is_the_stored_one(tmp_path, tokenizer):
    """Another one would move texts from validation to training where data grow."""
    write_shard(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(24)])
    preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, split=(2, 1, 1))
    found = {name: [int(text.split()[1]) for text in texts_of(tokenizer, tmp_path / "t" / name)]
             for name in ("valid", "test")}
    assert found == STORED


def test_a_share_of_nothing_gets_nothing(tmp_path, tokenizer):
    write_shard(tmp_path / "a.jsonl", records(50))
    assert list(preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer,
                           split=(1, 0, 0)).data_sets) == ["train"]


@pytest.mark.parametrize("shares", [(1,), (0, 1), (1, -1), (1, 1, 1, 1), (0, 0, 0)])
def test_shares_that_are_none(tmp_path, tokenizer, shares):
    write_shard(tmp_path / "a.jsonl", records(5))
    with pytest.raises(ValueError, match="is not train,valid"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, split=shares)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}


def test_sets_hold_their_own_documents_in_order(tmp_path, tokenizer):
    items = records(200)
    write_shard(tmp_path / "a.jsonl.zst", items)
    corpus = preprocess([tmp_path / "a.jsonl.zst"], tmp_path / "t", tokenizer,
                        set_key="pile_set_name")
    for name in SETS:
        prefix = tmp_path / "t" / NAMES[name]
        expected = [item["text"] for item in items if item["meta"]["pile_set_name"] == name]
        assert texts_of(tokenizer, prefix) == expected
        manifest = check_prefix(prefix, tokenizer.sha256)
        assert (manifest.set_name, manifest.split, manifest.documents) == (name, None,
                                                                           len(expected))
        assert manifest.text_bytes == sum(len(text.encode()) for text in expected)
        assert load_tokenizer(f"{prefix}.tokenizer").sha256 == tokenizer.sha256
    assert set(corpus.data_sets) == set(NAMES.values())
    assert read_corpus(tmp_path / "t") == corpus


def test_all_divisions_together(tmp_path, tokenizer):
    paths = [write_shard(tmp_path / f"{i}.jsonl", records(90, seed=i)) for i in range(3)]
    corpus = preprocess(paths, tmp_path / "t", tokenizer, set_key="pile_set_name", split=(1, 1),
                        per_shard=True)
    assert set(corpus.data_sets) == {f"{s}/{n}/{i}" for s in ("train", "valid")
                                     for n in NAMES.values() for i in "012"}
    for name, counts in corpus.data_sets.items():
        manifest = check_prefix(tmp_path / "t" / name)
        assert (manifest.documents, manifest.tokens) == (counts.documents, counts.tokens)
        [source] = manifest.sources
        assert source.path == str(paths[int(name[-1])]) and source.documents == manifest.documents
    assert sum(counts.documents for counts in corpus.data_sets.values()) == corpus.documents == 270
    assert not list((tmp_path / "t").rglob("*.lengths"))


def test_shards_of_the_same_name_are_refused(tmp_path, tokenizer):
    for directory in "ab":
        (tmp_path / directory).mkdir()
        write_shard(tmp_path / directory / "00.jsonl", records(5))
    with pytest.raises(ValueError, match="2 are called '00'.*Rename them"):
        preprocess([str(tmp_path / "*/00.jsonl")], tmp_path / "t", tokenizer, per_shard=True)
    # in one data set they are two inputs
    made = preprocess([str(tmp_path / "*/00.jsonl")], tmp_path / "t", tokenizer)
    assert made.documents == 10 and len(made.sources) == 2


def test_a_record_without_a_set_is_a_bad_record(tmp_path, tokenizer):
    metas = [{"meta": {"pile_set_name": "X"}}, {}, {"meta": {"pile_set_name": 3}}]
    items = [{"text": f"text {i}", **meta} for i, meta in enumerate(metas)]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(items))
    with pytest.raises(ValueError, match="a.jsonl, line 2: no set name in pile_set_name or meta"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, set_key="pile_set_name")
    corpus = preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, set_key="pile_set_name",
                        on_error="skip")
    assert (corpus.documents, corpus.skipped,
            [s.line for s in corpus.skipped_lines]) == (1, 2, [2, 3])


def test_sets_whose_names_fall_together_are_refused(tmp_path, tokenizer):
    items = [{"text": "one", "meta": {"pile_set_name": name}} for name in ("Pile-CC", "pile cc")]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(items))
    with pytest.raises(ValueError,
                       match="'Pile-CC' and 'pile cc' would both be written to .*t/pile_cc"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, set_key="pile_set_name")


def test_of_the_same_texts_the_first_is_kept(tmp_path, tokenizer):
    items = records(400) + records(100)
    paths = [write_shard(tmp_path / "a.jsonl", items[:250]),
             write_shard(tmp_path / "b.jsonl.gz", items[250:])]
    manifest = preprocess(paths, tmp_path / "t", tokenizer, deduplicate=True)
    expected = list(dict.fromkeys(item["text"] for item in items))
    assert texts_of(tokenizer, tmp_path / "t") == expected
    assert (manifest.documents, manifest.duplicates) == (len(expected), 500 - len(expected))
    assert all(s.records == s.documents + s.duplicates for s in manifest.sources)


def test_seen_texts_against_a_plain_set():
    rng = np.random.default_rng(0)
    seen, plain = DigestSet(), set()
    for size in [1, 5, 0, 300, 2, 1000, 17] * 6:
        numbers = rng.integers(0, 4000, size)
        digests = np.array([int(n).to_bytes(8, "little") * 2 for n in numbers], Encoded.DIGEST)
        new = seen.add(digests)
        assert new.tolist() == [n not in plain and n not in numbers[:i] for i,
                                n in enumerate(numbers)]
        plain |= set(numbers.tolist())
    assert sum(map(len, seen._runs)) == len(plain)
    everything = np.array([int(n).to_bytes(8, "little") * 2 for n in range(4000)], Encoded.DIGEST)
    assert (
        set(np.flatnonzero(~DigestSet(np.concatenate(seen._runs)).add(everything)).tolist())
        == plain
    )


def test_ftfy_mends_before_anything_else_looks_at_the_text(tmp_path, tokenizer):
    broken, mended = "âœ” No problems", "✔ No problems"
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": broken}, {"text": mended},
                                                 {"text": "plain"}]))
    preprocess([tmp_path / "a.jsonl"], tmp_path / "raw", tokenizer)
    assert texts_of(tokenizer, tmp_path / "raw") == [broken, mended, "plain"]
    manifest = preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, ftfy=True,
                          deduplicate=True)
    assert texts_of(tokenizer, tmp_path / "t") == [mended, "plain"]
    assert manifest.text_bytes == len((mended + "plain").encode())


def test_a_directory_of_data_sets_is_replaced_as_one(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": "one", "meta": {"pile_set_name": "A"}}]))
    (tmp_path / "b.jsonl").write_bytes(as_jsonl([{"text": "two", "meta": {"pile_set_name": "B"}}]))
    preprocess([tmp_path / "a.jsonl"], f"{tmp_path}/t/", tokenizer, set_key="pile_set_name")
    before = content(tmp_path / "t")
    with pytest.raises(ValueError,
                       match="output exists: .*t. Choose another prefix, or pass --overwrite"):
        preprocess([tmp_path / "b.jsonl"], tmp_path / "t", tokenizer, set_key="pile_set_name")
    assert content(tmp_path / "t") == before
    preprocess([tmp_path / "b.jsonl"], tmp_path / "t", tokenizer, set_key="pile_set_name",
               overwrite=True)
    assert {path.name for path in (tmp_path
                                   / "t").iterdir()} == {"corpus.json", *(f"b.{s}" for s in (
        "bin", "idx", "json", "tokenizer"))}
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "t"}


def test_a_directory_of_other_things_is_never_replaced(tmp_path, tokenizer):
    write_shard(tmp_path / "a.jsonl", records(5))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is no directory of data sets; choose another"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, split=(1, 1), overwrite=True)
    assert (tmp_path / "t" / "thesis.txt").read_text() == "keep me"


def test_the_same_call_makes_the_same_bytes_manifests_included(tmp_path, tokenizer):
    write_shard(tmp_path / "a.jsonl", records(100))
    made = []
    for _ in range(2):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, split=(9, 1), overwrite=True)
        made.append(content(tmp_path / "t"))
    assert made[0] == made[1] and "t/train.json" in made[0]
    assert json.loads((tmp_path / "t" / "corpus.json").read_bytes())["documents"] == 100


def test_sets_are_named_in_meta_or_in_the_record_itself(tmp_path, tokenizer):
    items = [{"text": "a", "source": "One"}, {"text": "b", "meta": {"source": "Two"}},
             {"text": "c", "meta": {"source": "Two"}, "source": "One"},
             {"text": "d", "meta": "of another kind", "source": "One"}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(items))
    corpus = preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, set_key="source")
    assert {name: c.documents for name, c in corpus.data_sets.items()} == {"one": 2, "two": 2}


@pytest.mark.parametrize(("what", "said"), [
    ("lengths", "documents in the data set: 5 in the files, and 6"),
    ("bin", "bytes of tokens in the data set: "), ("count", "tokens of the data sets together: ")])
def test_documents_that_are_lost_on_the_way_make_no_data_set(tmp_path, tokenizer, monkeypatch, what,
                                                             said):
    write_shard(tmp_path / "a.jsonl", records(6))
    write_index, counts = finalize.write_index, finalize.Journal.counts

    def lose(path, lengths, dtype) -> str:
        if what == "bin":
            path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-2])
        return write_index(path, lengths[:-1] if what == "lengths" else lengths, dtype)

    def miscount(ledger) -> dict:
        return {name: c.model_copy(update={"tokens": c.tokens + (what == "count")})
                for name, c in counts(ledger).items()}

    monkeypatch.setattr(finalize, "write_index", lose)
    monkeypatch.setattr(finalize.Journal, "counts", miscount)
    with pytest.raises(RuntimeError, match=f"^{said}.* came in; no data set"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "t", tokenizer)
    assert not list(tmp_path.glob("t.[bij]*"))
