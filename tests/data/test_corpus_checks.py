"""Each data set of a run is checked against the tokenizer in use, validation data too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spdf.data.pretraining import corpus
from megatron_spdf.data.pretraining.corpus import Corpus, check_corpus, data_tokenizer
from megatron_spdf.data.pretraining.sources import Source

TOKENIZER = SimpleNamespace(sha256="hash", vocab_size=256)


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the check asks of other parts, which find nothing wrong; b and d are of another tool."""
    asked: list[tuple] = []

    def note(name: str, gives=lambda *_: None):
        monkeypatch.setattr(corpus, name, lambda *parts: (
            asked.append((name, *parts)) or gives(*parts)))

    def source(prefix: str, *_) -> SimpleNamespace:
        return SimpleNamespace(prefix=prefix, tokens=10_000)
    note("expand", lambda data: [SimpleNamespace(prefix=prefix) for prefix in data.train])
    note("training_sources", lambda entries, _: [source(entry.prefix) for entry in entries])
    note("check_prefix", lambda prefix, *_: f"manifest of {prefix}")
    note("make_source", source)
    note("is_foreign", lambda prefix: prefix in "bd")
    note("look_at_ids")
    note("require_shared_memory")
    note("load_tokenizer", lambda *_: TOKENIZER)
    monkeypatch.setattr(corpus, "BlendHistory", lambda *parts: SimpleNamespace(
        require_unchanged=lambda: asked.append(("blend", *parts))))
    return asked


@pytest.mark.parametrize("change", ["refuse", "continue"])
def test_what_each_data_set_is_held_to(recipe, asked, monkeypatch, change):
    monkeypatch.setattr(corpus, "data_tokenizer", lambda recipe: TOKENIZER)
    made = recipe(data={"train": ["a", "b"], "valid": ["c", "d"], "on_blend_change": change})
    found = check_corpus(made)
    assert isinstance(found, Corpus) and found.tokenizer is TOKENIZER
    assert [s.prefix for s in found.train] == ["a", "b"]
    assert [s.prefix for s in found.valid] == ["c", "d"]
    assert asked[0] == ("expand", made.data)
    assert [(name, *rest) for name, entries, *rest in asked[1:2]] == [("training_sources", "hash")]
    assert asked[2:] == [
        *(call for prefix in "cd" for call in (
            ("check_prefix", prefix, "hash"), ("make_source", prefix, f"manifest of {prefix}"))),
        ("is_foreign", "a"), ("is_foreign", "b"), ("look_at_ids", "b", 256),
        ("is_foreign", "c"), ("is_foreign", "d"), ("look_at_ids", "d", 256),
        ("require_shared_memory", made),
        *([("blend", Path(made.output), found.train)] if change == "refuse" else [])]


@pytest.mark.parametrize(("named", "place"), [(None, "a.tokenizer"), ("own", "own")])
@pytest.mark.parametrize("end", [None, "<end>"])
def test_a_tokenizer_is_the_copy_beside_the_first_data_set_or_the_one_that_is_named(
        recipe, asked, named, place, end):
    made = recipe(data={"train": ["a", "b"], "tokenizer": named, "end_of_document": end})
    assert data_tokenizer(made) is TOKENIZER
    assert asked == [("expand", made.data), ("check_prefix", "a"), ("load_tokenizer", place, end)]


def test_contents_are_tokens_and_shares_wherever_they_lie_in_any_order():
    def of(*train: tuple[str, str, float], valid: str = "v") -> dict[str, str]:
        return Corpus(TOKENIZER, [Source(prefix, content, 9, weight)
                                  for prefix, content, weight in train],
                      [Source("place", content, 9) for content in valid]).contents

    known = of(("one", "x", 0.25), ("two", "y", 0.75))
    assert known["data.train"] == known["data.blend"]
    assert of(("moved", "y", 0.75), ("on", "x", 0.25 + 1e-12)) == known
    for other in (of(("one", "x", 0.75), ("two", "y", 0.25)), of(("one", "x", 1.0)),
                  of(("one", "x", 0.25), ("two", "z", 0.75)),
                  of(("one", "x", 0.25), ("two", "y", 0.7499))):
        assert other["data.train"] != known["data.train"]
        assert other["data.valid"] == known["data.valid"]
    other = of(("one", "x", 0.25), ("two", "y", 0.75), valid="w")
    assert other["data.valid"] != known["data.valid"] and other["data.blend"] == known["data.blend"]
