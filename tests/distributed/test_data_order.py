"""The samples of a run: the same at every data-parallel degree, after every resume, and through a
change of blend."""

from collections import ChainMap, Counter
from pathlib import Path

import numpy as np
import pytest
from harness import Outcomes, outcome, run_cases

pytestmark = pytest.mark.slow

SAMPLES = 1000
BATCH = 8
STEPS = SAMPLES // BATCH
RUN = {"tokens": SAMPLES * 32, "global_batch": BATCH, "micro_batch": 2}
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
def results(make_recipe, corpora, corpus, tmp_path_factory):
    blend = [{"path": path, "weight": weight} for path,
             weight in zip(corpora, (5, 3, 2), strict=True)]
    data = {"train": [], "blend": blend, "tokenizer": f"{corpus}.tokenizer"}
    runs, cache = tmp_path_factory.mktemp("runs"), str(tmp_path_factory.mktemp("cache"))
    found = {}
    for world in (1, 2, 4):
        cases = {}
        for name, starts in STARTS.items():
            # One cache for all at first, so that its keys are tried; at two replicas caches of
            # their own.
            recipe = make_recipe(str(runs / f"{world} {name}"), train=RUN, parallel={"data": world},
                                 data=data | {"index_cache": None if world == 2 else cache,
                                              "workers": 2 * (world == 2)})
            cases[name] = ("samples_of_run", {"recipe": recipe, "starts": starts})
        found[world] = run_cases(world, cases, tmp_path_factory.mktemp(f"world{world}"))
    return found


def together(results, world: int, name: str) -> dict[int, str]:
    parts = [outcome(results[world], name, rank)["samples"] for rank in range(world)]
    assert sum(map(len, parts)) == SAMPLES
    return {number: text for part in parts for number, text in part.items()}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_thousand_samples(results, world, name):
    assert together(results, world, name) == together(results, 1, "straight")


def test_they_are_a_thousand_samples(results):
    straight = together(results, 1, "straight")
    assert sorted(straight) == list(range(SAMPLES))
    # The smallest source gives 500 samples and holds 281: its second epoch repeats some windows,
    # not the other two.
    assert Counter(Counter(straight.values()).values())[1] > 600


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_consumed_tokens_of_each_source(results, corpora, world, name):
    ends = [*STARTS[name][1:], STEPS]
    for end, consumed in zip(ends, outcome(results[world], name)["consumed"], strict=True):
        assert sum(consumed.values()) == end * BATCH * 32
        for path, share in zip(corpora, (0.5, 0.3, 0.2), strict=True):
            assert abs(consumed[path] - share * end * BATCH * 32) <= 2 * 32


@pytest.fixture(scope="module")
def bordered(make_deep_recipe, short_documents, corpus, tmp_path_factory):
    short = {"train": short_documents, "valid": short_documents, "tokenizer": f"{corpus}.tokenizer"}
    boundaries = short | {"reset_positions": True, "reset_attention": True}
    layouts = {"one": (1, {}), "tp2": (2, {"tensor": 2, "sequence": True}),
               "pp2": (2, {"pipeline": 2}),
               "interleaved": (2, {"pipeline": 2, "interleave": 2})}
    recompute = {"full": "full", "selective": "selective"}
    cases = {1: {}, 2: {}}
    for name, (world, parallel) in layouts.items():
        cases[world][name] = ("train",
                              {"recipe": make_deep_recipe(parallel=parallel, data=boundaries),
                               "steps": 4})
    for name, kind in recompute.items():
        recipe = make_deep_recipe(data=boundaries, train={"recompute": kind})
        cases[1][name] = ("train", {"recipe": recipe, "steps": 4})
    cases[1]["off"] = ("train", {"recipe": make_deep_recipe(data=short), "steps": 4})
    cases[1]["packed"] = ("packed", {"recipe": make_deep_recipe(data=boundaries)})
    cases[1]["packed groups"] = ("packed",
                                 {"recipe": make_deep_recipe(data=boundaries,
                                                             model={"query_groups": 2})})
    directory = tmp_path_factory.mktemp("boundaries")
    found = {world: run_cases(world, cases[world], directory / str(world)) for world in cases}
    return Outcomes(ChainMap(*found.values()))


@pytest.mark.parametrize("name", ["packed", "packed groups"])
def test_documents_in_one_sequence_are_as_if_alone(bordered, name):
    there = bordered[name]
    assert len(there["together"]) == 25
    assert there["together"] == pytest.approx(there["apart"], rel=1e-5)


@pytest.mark.parametrize("name", ["tp2", "pp2", "interleaved", "full", "selective"])
def test_borders_are_the_same_at_every_layout(bordered, name):
    for (loss, norm), (expected, expected_norm) in zip(bordered[name]["curve"],
                                                       bordered["one"]["curve"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_borders_matter(bordered):
    assert bordered["one"]["curve"][3] != pytest.approx(bordered["off"]["curve"][3], rel=1e-5)
