"""Blends: shares as asked for, an order that depends on nothing else, and a change of blend that
loses no place."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from text_shards import as_jsonl, records, write_shard

from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.pretraining.blend import BlendHistory, BlendOrder
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.pretraining.pile import PILE_EPOCHS
from megatron_spdf.data.pretraining.sources import Source, expand, training_sources
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer
from megatron_spdf.recipe.load import load_recipe


def sources(**weights: float) -> list[Source]:
    total = sum(weights.values())
    return [Source(f"data/{name}", f"content of {name}", 1000, weight / total) for name,
            weight in weights.items()]


def history_of(directory: Path, *steps: tuple[int, dict[str, float]]) -> BlendHistory:
    """A run that was started at these samples with these blends, one after the other."""
    for first, weights in steps:
        history = BlendHistory(directory, sources(**weights))
        history.extend(first)
        history.save()
    return history


def drawn(history: BlendHistory, samples: int) -> list[tuple[str, int]]:
    """(source, its sample) of each of the first samples of a run."""
    contents, places, numbers = history.order(samples)
    return [(contents[place][-1], int(number)) for place,
            number in zip(places, numbers, strict=True)]


def test_shares_are_those_asked_for_at_every_moment(tmp_path):
    history = history_of(tmp_path, (0, {"a": 5, "b": 3, "c": 2}))
    order = drawn(history, 5000)
    for end in (10, 100, 1234, 5000):
        counts = Counter(name for name, _ in order[:end])
        for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(counts[name] - share * end) <= 2
    assert history.taken(1234) == {f"content of {n}": c for n,
                                   c in Counter(n for n, _ in order[:1234]).items()}


def test_every_source_is_read_in_its_own_order_without_a_gap(tmp_path):
    read = defaultdict(list)
    for name, number in drawn(history_of(tmp_path, (0, {"a": 5, "b": 3, "c": 2})), 3000):
        read[name].append(number)
    assert all(numbers == list(range(len(numbers))) for numbers in read.values())


def test_the_order_does_not_depend_on_the_length_of_the_run(tmp_path):
    history = history_of(tmp_path, (0, {"a": 5, "b": 3, "c": 2}))
    assert drawn(history, 5000)[:700] == drawn(history, 700)


CHANGES = [
    [(0, {"a": 1, "b": 1}), (100, {"a": 9, "b": 1})],
    [(0, {"a": 1, "b": 1}), (100, {"a": 1, "c": 1}), (250, {"b": 1, "a": 1, "c": 3})],
    [(0, {"a": 1}), (100, {"a": 1}), (200, {"a": 2, "b": 1}), (300, {"b": 1, "a": 2})],
]


@pytest.mark.parametrize("steps", CHANGES)
def test_after_a_change_each_source_goes_on_where_it_was(tmp_path, steps):
    order = drawn(history_of(tmp_path, *steps), 600)
    assert order[:steps[1][0]] == drawn(history_of(tmp_path / "before", steps[0]),
                                        600)[:steps[1][0]]
    read = defaultdict(list)
    for name, number in order:
        read[name].append(number)
    assert all(numbers == list(range(len(numbers))) for numbers in read.values())
    last, weights = steps[-1]
    counts = Counter(name for name, _ in order[last:])
    for name, weight in weights.items():
        assert abs(counts[name] - weight / sum(weights.values()) * (600 - last)) <= 2


def test_a_resume_before_the_change_repeats_what_was(tmp_path):
    steps = CHANGES[1]
    expected = drawn(history_of(tmp_path, *steps), 600)
    again = BlendHistory(tmp_path, sources(**steps[-1][1]))
    assert not again.changed
    again.extend(40)  # a checkpoint from before both changes
    assert drawn(again, 600) == expected


def test_a_change_further_back_takes_the_place_of_later_ones(tmp_path):
    expected = drawn(history_of(tmp_path / "straight", (0, {"a": 1, "b": 1}),
                                (50, {"b": 1, "d": 1})), 600)
    assert drawn(history_of(tmp_path, *CHANGES[1], (50, {"b": 1, "d": 1})), 600) == expected


def test_a_change_at_the_same_sample_takes_the_place_of_the_one_before(tmp_path):
    """A start that ended before any step has no stretch of the run."""
    history = history_of(tmp_path, (0, {"a": 1}), (40, {"a": 1, "b": 1}), (40, {"a": 1, "c": 3}))
    assert [(segment.first, segment.weights) for segment in history.segments] == [
        (0, {"content of a": 1.0}), (40, {"content of a": 0.25, "content of c": 0.75})]


def test_a_change_that_nobody_asked_for_is_refused_with_both_shares(tmp_path):
    history_of(tmp_path, (0, {"a": 3, "b": 1}))
    with pytest.raises(ValueError) as error:
        BlendHistory(tmp_path, sources(a=1, c=1)).require_unchanged()
    for said in ("data/a (content of a) had 0.75 of the samples and has 0.5",
                 "data/b (content of b) had 0.25",
                 "data/c (content of c) had 0 of the samples and has 0.5",
                 "data.on_blend_change=continue"):
        assert said in str(error.value)
    BlendHistory(tmp_path, sources(b=1, a=3)).require_unchanged()
    with pytest.raises(ValueError, match="had 0.75 of the samples and has 0.749373"):
        BlendHistory(tmp_path, sources(a=2.99, b=1)).require_unchanged()


def test_the_cached_order_is_the_order(tmp_path):
    history = history_of(tmp_path, *CHANGES[0])
    for samples in (600, 600, 900, 300):  # of a run that was lengthened, too
        order = BlendOrder.cached(history, samples, tmp_path / "cache")
        named = [(order.contents[p][-1], int(n)) for p,
                 n in zip(order.places, order.numbers, strict=True)]
        assert named == drawn(history, samples)
    assert isinstance(order.places, np.memmap)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tiny_bpe) -> Path:
    """sets/pile_cc, sets/wikipedia_en, sets/github; plain a, b of other sizes; a data set of no
    Pile."""
    directory = tmp_path_factory.mktemp("corpora")
    tokenizer = load_tokenizer(tiny_bpe)
    write_shard(directory / "all.jsonl", records(120))
    preprocess([directory / "all.jsonl"], directory / "sets", tokenizer, set_key="pile_set_name")
    for name, count in (("a", 30), ("b", 70)):
        write_shard(directory / f"{name}.jsonl", records(count, seed=count))
        preprocess([directory / f"{name}.jsonl"], directory / name, tokenizer)
    (directory / "mine.jsonl").write_bytes(as_jsonl([{**records(1)[0],
                                                      "meta": {"pile_set_name": "Mine"}}] * 9))
    preprocess([directory / "mine.jsonl"], directory / "other", tokenizer, set_key="pile_set_name")
    return directory


@pytest.fixture
def chosen(recipe, corpora, tiny_bpe):
    """Training sources of a `data` section: last part of the prefix -> weight."""
    def choose(**data) -> dict[str, float]:
        made = recipe(data=data, train={"sequence_length": 16})
        return {Path(s.prefix).name: s.weight
                for s in training_sources(expand(made.data), load_tokenizer(tiny_bpe).sha256)}
    return choose


def tokens(prefix: Path) -> int:
    return json.loads(Path(f"{prefix}.json").read_bytes())["tokens"]


def test_weights_epochs_and_sizes(chosen, corpora):
    a, b = tokens(corpora / "a"), tokens(corpora / "b")
    paths = {"a": str(corpora / "a"), "b": str(corpora / "b")}
    assert chosen(train=list(paths.values())) == pytest.approx({"a": a / (a + b), "b": b / (a + b)})
    weighted = [{"path": path, "weight": 3 if name == "a" else 1} for name, path in paths.items()]
    assert chosen(blend=weighted) == pytest.approx({"a": 0.75, "b": 0.25})
    passes = [{"path": path, "epochs": 3 if name == "a" else 1} for name, path in paths.items()]
    assert chosen(blend=passes) == pytest.approx({"a": 3 * a / (3 * a + b), "b": b / (3 * a + b)})


def test_the_piles_epochs_by_set(chosen, corpora):
    names = {"pile_cc": "Pile-CC", "wikipedia_en": "Wikipedia (en)", "github": "Github"}
    effective = {slug: PILE_EPOCHS[name] * tokens(corpora / "sets" / slug) for slug,
                 name in names.items()}
    expected = {slug: size / sum(effective.values()) for slug, size in effective.items()}
    assert chosen(blend=[{"path": f"{corpora}/sets/*",
                          "epochs": "pile"}]) == pytest.approx(expected)
    with pytest.raises(ValueError,
                       match="other/mine holds the set 'Mine', which is none of the Pile's"):
        chosen(blend=[{"path": f"{corpora}/other/*", "epochs": "pile"}])


def test_the_piles_table_is_the_papers():
    """Raw GiB of each set, table 1 of the paper, give the effective size that it states."""
    raw = dict(zip(PILE_EPOCHS,
                   (227.12, 90.27, 100.96, 62.77, 56.21, 95.16, 51.15, 32.20, 22.90, 19.26, 10.88,
                    12.98,
                                 6.38, 7.75, 5.52, 6.30, 4.59, 3.90, 3.73, 2.38, 1.89, 0.88),
                   strict=True))
    assert len(PILE_EPOCHS) == 22 and sum(raw.values()) == pytest.approx(825.18, abs=0.01)
    assert sum(raw[name] * epochs for name,
               epochs in PILE_EPOCHS.items()) == pytest.approx(1254.20, abs=0.2)


def test_the_weight_of_a_pattern_is_shared_by_tokens(chosen, corpora):
    sizes = {name: tokens(corpora / "sets" / name)
             for name in ("github", "pile_cc", "wikipedia_en")}
    weights = chosen(blend=[{"path": f"{corpora}/sets/*", "weight": 1},
                            {"path": str(corpora / "a"), "weight": 3}])
    assert weights.pop("a") == pytest.approx(0.75)
    assert weights == pytest.approx({n: 0.25 * size / sum(sizes.values()) for n,
                                     size in sizes.items()})


def test_a_pattern_of_nothing_and_the_same_tokens_twice_are_refused(chosen, corpora):
    with pytest.raises(ValueError, match=r"nosuch/\*' matches no data set"):
        chosen(blend=[{"path": f"{corpora}/nosuch/*", "weight": 1}])
    with pytest.raises(ValueError,
                       match="hold the same tokens, and would be read in the same order"):
        chosen(train=[str(corpora / "a"), f"{corpora}/../{corpora.name}/a"])


@pytest.mark.parametrize(("data", "said"), [
    ("{train: x, blend: [{path: y, weight: 1}]}",
     "data.train and data.blend both name training data"),
    ("{blend: [{path: y}]}", "data.blend: y needs either a weight or epochs"),
    ("{blend: [{path: y, weight: 1, epochs: 2}]}", "data.blend: y needs either a weight or epochs"),
    ("{blend: [{path: y, weight: 1}, {path: z, epochs: 2}]}",
     "data.blend mixes weights and epochs"),
    ("{blend: [{path: y, weight: 0}]}", "data.blend.0.weight=0: input should be greater than 0"),
    ("{blend: [{path: y, wieght: 1}]}", "did you mean data.blend.0.weight?"),
    ("{blend: [{path: y, epochs: many}]}", "data.blend.0.epochs"),
    ("{on_blend_change: maybe}", "data.on_blend_change='maybe'"),
])
def test_blends_that_are_none(tmp_path, data, said):
    (tmp_path / "recipe.yaml").write_text(
        "output: run\nmodel: {layers: 4, hidden: 64, heads: 4, vocab_size: 256, max_positions: "
        "32}\ntrain: {tokens: 2560, global_batch: 8, micro_batch: 2}\noptimizer: {lr: "
        f"1.0e-3}}\ndata: {data}\n")
    with pytest.raises(ValueError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert said in str(error.value)


def test_a_run_refuses_another_blend_or_other_tokens_before_it_starts(recipe, corpora, tmp_path,
                                                                      tiny_bpe):
    model = {"vocab_size": 300}
    made = recipe(data={"train": str(corpora / "a")}, model=model)
    corpus = check_corpus(made)
    history = BlendHistory(Path(made.output), corpus.train)
    history.extend(0)
    history.save()
    assert check_corpus(made).train == corpus.train
    other = {"train": [str(corpora / "a"), str(corpora / "b")]}
    with pytest.raises(ValueError, match="the blend is not the one that .*run was trained with"):
        check_corpus(recipe(data=other, model=model))
    check_corpus(recipe(data={**other, "on_blend_change": "continue"}, model=model))
    write_shard(tmp_path / "a.jsonl", records(30, seed=31))
    preprocess([tmp_path / "a.jsonl"], tmp_path / "a", load_tokenizer(tiny_bpe))
    for suffix in ("bin", "idx", "json"):  # the same name, other tokens
        Path(f"{corpora}/a.{suffix}").rename(f"{corpora}/a.{suffix}.kept")
        Path(f"{tmp_path}/a.{suffix}").rename(f"{corpora}/a.{suffix}")
    try:
        with pytest.raises(ValueError, match="had 1 of the samples and has 0"):
            check_corpus(made)
    finally:
        for suffix in ("bin", "idx", "json"):
            Path(f"{corpora}/a.{suffix}.kept").rename(f"{corpora}/a.{suffix}")


def test_other_tokens_of_the_same_lengths_are_another_source(recipe, tmp_path, tiny_bpe):
    """Two data sets that differ in a byte that no token joins with others."""
    made = {}
    for name, mark in (("a", "\x01"), ("b", "\x02")):
        write_shard(tmp_path / f"{name}.jsonl", [{"text": f"{mark} {r['text']} {mark}"}
                                                 for r in records(30)])
        preprocess([tmp_path / f"{name}.jsonl"], tmp_path / name, load_tokenizer(tiny_bpe))
        made[name] = check_corpus(recipe(data={"train": str(tmp_path / name)},
                                         model={"vocab_size": 300}, output=str(tmp_path / "run")))
    (a,), (b,) = made["a"].train, made["b"].train
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert a.tokens == b.tokens and a.content != b.content
    history = BlendHistory(tmp_path / "run", made["a"].train)
    history.extend(0)
    history.save()
    with pytest.raises(ValueError, match="the blend is not the one that"):
        check_corpus(recipe(data={"train": str(tmp_path / "b")}, model={"vocab_size": 300},
                            output=str(tmp_path / "run")))
