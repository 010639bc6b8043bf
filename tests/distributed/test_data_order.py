"""The samples of a run: the same at every data-parallel degree, after every resume, and through a
change of blend."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import packed, samples_of_run, train
from curves import close
from harness import world_of

pytestmark = pytest.mark.slow

SAMPLES = 1000
BATCH = 8
STEPS = SAMPLES // BATCH
RUN = {"tokens": SAMPLES * 32, "global_batch": BATCH, "micro_batch": 2}
BORDERS = {"reset_positions": True, "reset_attention": True}
STARTS = {"straight": [0], "resumed": [0, 17, 18, 90]}


def write(prefix: Path, documents: list) -> str:
    """A data set of token arrays."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def text(corpus):
    """(tokens,) of the small corpus."""
    return np.fromfile(f"{corpus}.bin", np.uint16)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, text):
    """Prefixes of three data sets: parts of the small corpus, of other lengths."""
    directory, parts = tmp_path_factory.mktemp("sources"), ((0, 9_000), (9_000, 40_000),
                                                            (40_000, 55_000))
    return [write(directory / f"s{i}", np.array_split(text[first:last], 30 + i))
            for i, (first, last) in enumerate(parts)]


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory, text):
    """Prefix of a data set of documents of 2 to 20 tokens, so that every sequence has
    boundaries."""
    cuts = np.cumsum(np.random.default_rng(0).integers(1, 20, 2000))
    documents = [np.append(document, 299) for document in np.split(text, cuts)[:-1]]
    return write(tmp_path_factory.mktemp("short") / "short", documents)


@pytest.fixture(scope="module")
def samples(ranks, make_recipe, corpora, corpus, tmp_path_factory):
    """What each rank reads of a run on so many, started at these steps."""
    blend = [{"path": path, "weight": weight} for path,
             weight in zip(corpora, (5, 3, 2), strict=True)]
    data = {"train": [], "blend": blend, "tokenizer": f"{corpus}.tokenizer"}
    cache = str(tmp_path_factory.mktemp("cache"))

    def read(world: int, starts: list[int]) -> list[dict]:
        # One cache for all at first, so that its keys are tried; at two replicas caches of their
        # own.
        recipe = make_recipe(train=RUN, parallel={"data": world},
                             data=data | {"index_cache": None if world == 2 else cache,
                                          "workers": 2 * (world == 2)})
        return ranks(world).run_all(samples_of_run, recipe, starts)
    return read


def together(ranks: list[dict]) -> dict[int, str]:
    parts = [there["samples"] for there in ranks]
    assert sum(map(len, parts)) == SAMPLES
    return {number: text for part in parts for number, text in part.items()}


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_thousand_samples(samples, world, starts):
    assert together(samples(world, starts)) == together(samples(1, [0]))


def test_they_are_a_thousand_samples(samples):
    straight = together(samples(1, [0]))
    assert sorted(straight) == list(range(SAMPLES))
    # The smallest source gives 500 samples and holds 281: its second epoch repeats some windows,
    # not the other two.
    assert Counter(Counter(straight.values()).values())[1] > 600


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_consumed_tokens_of_each_source(samples, corpora, world, starts):
    ends = [*starts[1:], STEPS]
    for end, consumed in zip(ends, samples(world, starts)[0]["consumed"], strict=True):
        assert sum(consumed.values()) == end * BATCH * 32
        for path, share in zip(corpora, (0.5, 0.3, 0.2), strict=True):
            assert abs(consumed[path] - share * end * BATCH * 32) <= 2 * 32


@pytest.fixture(scope="module")
def short(make_deep_recipe, short_documents, corpus):
    """A recipe for the short documents, with sections changed by keyword."""
    files = {"train": short_documents, "valid": short_documents,
             "tokenizer": f"{corpus}.tokenizer"}
    return lambda data=BORDERS, **sections: make_deep_recipe(data=files | data, **sections)


@pytest.mark.parametrize("model", [{}, {"query_groups": 2}], ids=str)
def test_documents_in_one_sequence_are_as_if_alone(ranks, short, model):
    there = ranks(1).run(packed, short(model=model))
    assert len(there["together"]) == 25
    assert there["together"] == pytest.approx(there["apart"], rel=1e-5)


@pytest.mark.parametrize("sections", [
    {"parallel": {"tensor": 2, "sequence": True}}, {"parallel": {"pipeline": 2}},
    {"parallel": {"pipeline": 4}},  # stages between the first and the last need them too
    {"parallel": {"pipeline": 2, "interleave": 2}}, {"train": {"recompute": "full"}},
    {"train": {"recompute": "selective"}}], ids=str)
def test_borders_are_the_same_at_every_layout(ranks, short, sections):
    recipe = short(**sections)
    close(ranks(world_of(recipe)).run(train, recipe, steps=4)["curve"],
          ranks(1).run(train, short(), steps=4)["curve"])


def test_borders_matter(ranks, short):
    with_borders, without = (ranks(1).run(train, short(data), steps=4)["curve"]
                             for data in (BORDERS, {}))
    assert with_borders[3] != pytest.approx(without[3], rel=1e-5)
