"""A cell of an experiment is tuned until no neighbor of its best point is better, goes on where it
was interrupted, and is then run with every seed."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import yaml
from test_experiment import AXES, RECIPE, ROOT, finish

from megatron_spdf.runs.experiment import load_experiment, render
from megatron_spdf.runs.tuning import neighbors, render_neighbors, search, tuned_cells

sys.path.insert(0, str(ROOT / "tools"))
import experiment as tool  # noqa: E402

TUNE = {"optimizer.lr": 2, "model.init_std": 3.0}


@pytest.fixture
def grid(tmp_path):
    """Writes an experiment that tunes, and returns the tuned cells of its file."""
    def write(axes=AXES, tune=TUNE, **more):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({
            "recipe": "recipe.yaml", "output": str(tmp_path / "out"), "seeds": [4, 5],
            "axes": axes, "tune": tune, "plot": {"x": list(axes)[-1]}, **more}, sort_keys=False))
        return tuned_cells(load_experiment(path), path, [])
    return write


def explore(loss, start=(0, 0)) -> tuple[tuple, dict]:
    """The end of a search whose runs are done as it asks for them, and all losses."""
    known: dict = {}
    while True:
        best, unknown = search(start, known.get)
        if not unknown:
            return best, known
        assert not known.keys() & set(unknown)
        known |= {point: loss(point) for point in unknown}


@pytest.mark.parametrize("place", [(0, 0), (1, 0), (-3, 2), (0, -5)])
def test_the_best_point_is_found_from_afar_with_all_its_neighbors(place):
    best, known = explore(lambda p: sum((a - b) ** 2 for a, b in zip(p, place, strict=True)))
    assert best == place and set(neighbors(place)) <= known.keys()
    assert all(known[place] < known[n] for n in neighbors(place))
    assert len(known) <= 5 + 3 * sum(map(abs, place))


def test_a_search_waits_for_all_neighbors_so_that_it_goes_the_same_way_always():
    known = {(0, 0): 2.0, (1, 0): 1.0}  # and a better one may be among the others
    assert search((0, 0), known.get) == ((1, 0), [(-1, 0), (0, -1), (0, 1)])


def test_no_result_is_the_worst_and_equal_losses_move_nothing():
    assert explore(lambda p: math.inf if p[0] > 0 else -p[0] - p[1] + p[1] ** 2)[0] in {(0, 0),
                                                                                   (0, 1)}
    assert explore(lambda p: 1.0)[0] == (0, 0)
    assert explore(lambda p: math.inf) == ((0, 0), dict.fromkeys([(0, 0), *neighbors((0, 0))],
                                                                 math.inf))


def test_points_are_runs_with_the_cells_own_values_times_powers_of_the_factors(grid):
    axes = {"masks": {"dense": {"sparsity.level": 0},
                      "75%": {"sparsity.level": 0.75, "optimizer.lr": 8e-3}}}
    dense, sparse = grid(axes)
    there = sparse.at((-1, 1))
    assert there.labels == {"masks": "75%", "optimizer.lr": "0.004", "model.init_std": "0.06"}
    recipe = there.recipes[5]
    assert (recipe.optimizer.lr, recipe.model.init_std, recipe.sparsity.level) == (4e-3, 0.06, 0.75)
    assert (recipe.seed, recipe.sparsity.seed) == (5, 5)
    assert dense.at((0, 0)).recipes[4].optimizer.lr == RECIPE["optimizer"]["lr"]
    outputs = {cell.at(point).trials[seed].output for cell in (dense, sparse)
               for point in [(0, 0), *neighbors((0, 0))] for seed in (4, 5)}
    assert len(outputs) == 20


def test_a_search_begins_where_the_grid_says_and_counts_from_the_cells_own_values(grid):
    axes = {"masks": {"dense": {"sparsity.level": 0}, "75%": {"sparsity.level": 0.75}},
            "model.layers": [1, 2]}
    cells = grid(axes, begin=[
        {"cells": {}, "factors": {"model.init_std": 1}},
        {"cells": {"masks": "75%", "model.layers": 2}, "factors": {"optimizer.lr": -2}}])
    own = RECIPE["optimizer"]["lr"]
    for cell in cells:
        first = [(t.values["optimizer.lr"], t.values["model.init_std"]) for t in cell.left(())][0]
        last = cell.trial.labels == {"masks": "75%", "model.layers": "2"}
        assert first == ((own / 4, 0.02) if last else (own, 0.06))
        assert cell.at((0, 0)).recipes[4].optimizer.lr == own


def run(cell, trials, loss) -> None:
    """Does the runs of these directories."""
    for point in [(0, 0), *neighbors((0, 0)), *neighbors((1, 0)), *neighbors((2, 0))]:
        there = cell.at(point)
        for seed, trial in there.trials.items():
            if trial.output in {t.output for t in trials} and not trial.output.exists():
                finish(trial, there.recipes[seed], loss(point, seed))


@pytest.mark.slow
def test_a_cell_is_tuned_with_the_first_seed_and_then_run_with_all(grid):
    (cell,) = grid({"sparsity": [0]})

    def loss(point, seed):
        return 2.0 + (point[0] - 1) ** 2 + point[1] ** 2 + seed / 100

    first = cell.left(())
    assert [t.values["seed"] for t in first] == [4] * 5
    run(cell, first[:2], loss)
    assert len(cell.left(())) == 3 and cell.result(())["searching"] == 3  # it was interrupted
    run(cell, first, loss)
    second = cell.left(())
    assert {t.values["optimizer.lr"] for t in second} == {2e-3, 4e-3} and len(second) == 3
    run(cell, second, loss)
    (last,) = cell.left(())
    assert last.values == {"sparsity": 0, "optimizer.lr": 2e-3, "model.init_std": 0.02, "seed": 5,
                           "sparsity.seed": 5}
    run(cell, [last], loss)
    assert cell.left(()) == []
    found = cell.result(())
    assert found["losses"] == {4: 2.04, 5: 2.05} and found["mean"] == pytest.approx(2.045)
    assert (found["tried"], found["searching"], found["missing"]) == (8, 0, 0)
    assert found["neighbors"] == {"optimizer.lr": [3.04, 2.04, 3.04],
                                  "model.init_std": [3.04, 2.04, 3.04]}
    tables = render(cell.experiment, [found]) + render_neighbors(cell.experiment, [found])
    words = " ".join(tables.split())
    assert "| 0 | 0.002 | 0.02 | 1,024 |" in words and "2.0450 ± 0.0635 | 2 |" in words
    assert "| 0 | optimizer.lr | 0.002 | 3.0400 | 2.0400 | 3.0400 | 8 |" in words
    assert "searches have not ended" not in words


def test_a_run_without_a_result_is_tried_once_at_a_start(grid):
    (cell,) = grid({"sparsity": [0]})
    first = cell.left(())
    tried = {t.output for t in first}
    run(cell, first[:4], lambda point, seed: 3.0 + point[0] ** 2 + point[1] ** 2)
    (last,) = cell.left(tried)  # the search is over, and the second seed is left
    assert last.values["seed"] == 5
    assert cell.left(()) == first[4:]  # another start tries it again
    found = cell.result(tried)
    assert found["neighbors"]["model.init_std"] == [4.0, 3.0, None]
    assert "| 4.0000 | 3.0000 | - |" in " ".join(
        render_neighbors(cell.experiment, [found]).split())


def test_a_value_that_no_recipe_can_have_is_the_worst(grid):
    (cell,) = grid({"sparsity": [0]}, tune={"optimizer.beta1": 2})
    assert [t.values["optimizer.beta1"] for t in cell.left(())] == [0.9, 0.45]  # and not 1.8
    for point, loss in (((0,), 2.0), ((-1,), 3.0)):
        finish(cell.at(point).trials[4], cell.at(point).recipes[4], loss)
    found = cell.result(())
    assert found["neighbors"] == {"optimizer.beta1": [3.0, 2.0, None]} and not found["searching"]


@pytest.mark.parametrize(("tune", "said"), [
    ({"optimizer.lr": 1.0}, "tune.optimizer.lr=1.0: input should be greater than 1"),
    ({"optimizer.embedding_lr": 2}, "optimizer.embedding_lr is None in the recipe"),
    ({"model": 2}, "model is {"), ({"optimizer.rate": 2}, "optimizer.rate is None"),
    ({"sparsity": 2}, "sparsity is an axis and to be tuned")])
def test_what_cannot_be_tuned_is_refused_before_a_run(grid, tune, said):
    with pytest.raises(ValueError) as caught:
        for cell in grid(tune=tune):
            cell.left(())
    assert said in str(caught.value)


@pytest.mark.parametrize(("begin", "said"), [
    ({"cells": {"masks": "2:4"}, "factors": {"optimizer.lr": 1}}, "begin names masks=2:4, and the"),
    ({"cells": {}, "factors": {"seed": 1}}, "begin.factors has seed, and the keys of tune are"),
    ({"cells": {}, "factors": {"optimizer.lr": 0.5}}, "begin.0.factors.optimizer.lr=0.5: input"),
    ({"factors": {"optimizer.lr": 1}}, "begin.0.cells is missing"), (3, "begin.0=3")])
def test_a_begin_that_names_no_cell_or_no_key_is_refused(grid, begin, said):
    with pytest.raises(ValueError) as caught:
        grid({"masks": {"dense": {"sparsity.level": 0}}}, begin=[begin])
    assert said in str(caught.value)


def test_tables_go_to_their_place_on_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- grid -->\nold\n<!-- end of grid -->\n\nAfter.\n")
    for table in ("| a |\n", "| b |\n"):
        tool.write_into(page, "grid", table)
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- grid -->\n\nReported 20")
    assert text.endswith("\n\n| b |\n\n<!-- end of grid -->\n\nAfter.\n")
    assert "torch 2" in text and "old" not in text and "| a |" not in text
    with pytest.raises(ValueError, match=r"no lines <!-- other --> and <!-- end of other -->"):
        tool.write_into(page, "other", "")


@pytest.mark.parametrize(("text", "said"), [(None, "cannot be read"), (b"\xff", "cannot be read"),
                                            (b"<!-- grid -->\n", "has no lines <!-- grid -->")])
def test_a_page_without_a_place_is_refused_before_a_run(grid, tmp_path, monkeypatch, capsys, text,
                                                        said):
    grid({"sparsity": [0]})
    if text is not None:
        (tmp_path / "page.md").write_bytes(text)
    monkeypatch.setattr(tool, "run_all", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(tmp_path / "grid.yaml"), "--page",
                                      str(tmp_path / "page.md")])
    assert tool.main() == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_tool_goes_round_after_round_until_all_is_done(grid, tmp_path, monkeypatch, capsys):
    cells = grid({"sparsity": [0, 0.75]}, tune={"optimizer.lr": 2})
    rounds, checked = [], []

    def run_all(commands, jobs, until):
        assert {trial.output for trial, _ in checked} == set(commands)
        checked.clear()
        rounds.append(len(commands))
        for output, words in commands.items():
            rate = float(next(w for w in words if w.startswith("optimizer.lr="))[13:])
            trial, recipe = next((c.trials[s], c.recipes[s]) for cell in cells for p in range(-3, 6)
                                 for c in [cell.at((p,))] for s in c.trials
                                 if c.trials[s].output == output)
            if rate < 5e-3:  # others diverge
                finish(trial, recipe, 3.0 + abs(math.log2(rate / 4e-3)))
        return [0] * len(commands)

    monkeypatch.setattr(tool, "run_all", run_all)
    monkeypatch.setattr(tool, "check_ahead", lambda planned: checked.extend(planned))
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(tmp_path / "grid.yaml"), "--jobs", "2"])
    assert tool.main() == 0
    # three points a cell, one more for each step up to 4e-3 and beyond, the second seed
    assert rounds == [6, 2, 2, 2]
    out = capsys.readouterr().out
    assert "3.0000 ± 0.0000" in out and (Path(tmp_path) / "out/results.png").stat().st_size > 1000
    assert "Infinity" not in (tmp_path / "out/results.json").read_text()
    tried = [line.split(",")[:2] for line in (tmp_path / "out/tried.csv").read_text().splitlines()]
    assert {(level, float(rate)) for level, rate in tried[1:]} == {
        (level, rate) for level in ("0", "0.75") for rate in (5e-4, 1e-3, 2e-3, 4e-3)}
    assert len(tried) == 1 + 2 * 5  # the second seed at the best
