"""What tools/benchmark.py is asked for is what is measured, and all that is measured is published:
recipes, steps, seconds, files, and on what, when and with what.

What measures is replaced by what keeps its arguments.
"""

from __future__ import annotations

from pathlib import Path

import benchmark
import pytest
import torch
from benchmarks import (
    data_throughput,
    kernel_throughput,
    moves,
    page,
    rates,
    save,
    step,
    suite,
    tiles,
    train,
)

from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.sparsity.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs/pretrain/demo.yaml")
ALONE = ["parallel.tensor=1", "log.every=7"]


@pytest.fixture
def asked(monkeypatch):
    """Runs the tool; what `measured` was called with, and what was published."""
    published = []
    monkeypatch.setattr(benchmark, "publish", lambda *given: published.append(given))
    monkeypatch.setattr(benchmark, "circumstances", lambda *libraries: {"when": "now"})

    def run(module, measure: str, *words: str) -> tuple[tuple, tuple]:
        calls: list = []
        monkeypatch.setattr(module, measure, lambda *given: calls.append(given) or {"it": 1})
        for name in ("render_steps", "render_training", "render_saves", "render_moves", "render"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda figures: ["said", figures])
        monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
        assert benchmark.main() == 0
        return calls.pop(), published.pop()
    return run


@pytest.mark.parametrize(("what", "module", "measure"), [
    ("step", step, "measure_steps"), ("train", train, "measure_training"),
    ("save", save, "measure_saves")])
def test_a_recipe_is_measured_dense_and_as_it_is(asked, tmp_path, what, module, measure):
    file = tmp_path / "figures.json"
    (compared, steps), published = asked(module, measure, what, DEMO, *ALONE, "--steps", "7",
                                         "--output", str(file))
    own = load_recipe(DEMO, ALONE)
    dense = load_recipe(DEMO, [*ALONE, "sparsity=0.0", "sparsity.rules=[]"])
    assert steps == 7 and compared == {"dense": dense, "sparse": own}
    assert list(compared) == ["dense", "sparse"]
    assert published == ({"when": "now", "recipe": own.model_dump(), "runs": {"it": 1}},
                         ["said", {"it": 1}], file)
    assert asked(module, measure, what, DEMO, *ALONE)[0][1] == 20
    compared = asked(module, measure, what)[0][0]
    assert compared["sparse"] == load_recipe(benchmark.DEFAULT)


def test_moves_are_measured_of_the_recipes_algorithm_or_of_each(asked):
    (compared, _), _ = asked(moves, "measure_moves", "moves", DEMO, *ALONE)
    assert compared == {name: load_recipe(DEMO, [*ALONE, f"sparsity.algorithm={name}"])
                        for name in moves.ALGORITHMS}
    words = [*ALONE, "sparsity.algorithm=rigl"]
    (compared, _), published = asked(moves, "measure_moves", "moves", DEMO, *words)
    assert compared == {"rigl": load_recipe(DEMO, words)}
    assert published[0]["recipe"] == load_recipe(DEMO, words).model_dump()


@pytest.mark.parametrize("gpu", [False, True])
def test_kernels_are_measured_for_as_long_as_asked(asked, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    given, published = asked(kernel_throughput, "measure", "kernels", DEMO, "--seconds", "0.5",
                             *ALONE)
    recipe = load_recipe(DEMO, ALONE)
    assert given == (recipe, given[1], 0.5)
    assert list(given[1].weights) == list(Plan.of(recipe).weights) != []
    assert published == ({"when": "now", "recipe": recipe.model_dump(), "it": 1},
                         ["said", {"it": 1}], None)
    given, published = asked(tiles, "measure", "tiles", DEMO, *ALONE)
    assert given == (recipe, given[1], torch.device("cuda" if gpu else "cpu"), 0.2)
    assert published[0] == {"when": "now", "recipe": recipe.model_dump(), "tiles": {"it": 1}}
    own = (load_recipe(benchmark.TILES) if gpu else
           load_recipe(benchmark.DEFAULT, [*benchmark.TINY, "seed=3"]))
    words = [] if gpu else ["seed=3"]
    assert asked(kernel_throughput, "measure", "kernels", *words)[0][0] == own


def test_data_are_preprocessed_by_as_many_workers_and_rounds_as_asked(asked, tmp_path):
    (*given, place, theirs), published = asked(
        data_throughput, "measure", "data", "a", "b", "--tokenizer", "t", "--workers", "3", "4",
        "--rounds", "2", "--megatron-lm", "lm", "--output", str(tmp_path / "f.json"))
    assert given == [["a", "b"], Path("t"), [3, 4], 2] and theirs == Path("lm")
    assert not place.exists()  # a temporary directory
    assert published == ({"when": "now", "it": 1}, ["said", {"it": 1}], tmp_path / "f.json")
    (*given, _, theirs), _ = asked(data_throughput, "measure", "data", "a", "--tokenizer", "t")
    assert given == [["a"], Path("t"), [1, 2], 3] and theirs is None


def test_the_suite_its_pages_and_its_rates_are_those_that_are_asked_for(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(suite, "run", lambda *given: calls.append(given) or 0)
    monkeypatch.setattr(page, "render_pages", lambda *given: calls.append(given) or [])
    monkeypatch.setattr(rates, "write_rates", lambda *given: calls.append(given))
    monkeypatch.setattr(rates, "rates_rows", lambda found: [])
    first = next(iter(suite.PARTS))
    for words in (["--suite", "cpu", "--parts", first, "--output", "d"], ["--suite", "cpu"],
                  ["page", "a", "b", "--directory", "d", "--page", "p", "q"], ["page", "a"],
                  ["rates", "a", "--output", str(tmp_path / "r.json"), "--page", "p"],
                  ["rates", "a", "b"]):
        monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
        assert benchmark.main() == 0
    assert calls == [
        ("cpu", [first], Path("d")), ("cpu", list(suite.PARTS), Path("runs/suite")),
        ([Path("a"), Path("b")], Path("d"), [Path("p"), Path("q")]),
        ([Path("a")], ROOT / "docs/benchmarks", []),
        ([Path("a")], [Path("p")], tmp_path / "r.json"), ([Path("a"), Path("b")], [], rates.FILE)]
