"""Runs whose losses a table has are not made again, whatever machine made them; a table of another
grid is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from test_experiment import AXES, ROOT, finish
from test_experiment import grid as grid  # a fixture  # noqa: PLC0414

from megatron_spdf.runs.experiment import cells, load_experiment, results
from megatron_spdf.runs.known import Known
from megatron_spdf.runs.loss_table import read_table, rows_of, write_table
from megatron_spdf.runs.tuning import tuned_cells

sys.path.insert(0, str(ROOT / "tools"))
import experiment as tool  # noqa: E402


@pytest.fixture
def elsewhere(grid, tmp_path):
    """File of a grid, the cells as another machine has finished them, and their table; here there
    is no run directory."""
    path = grid()
    experiment = load_experiment(path)
    found = cells(experiment, path, [])
    for number, cell in enumerate(found):
        for seed in (1, 2):
            finish(cell.trials[seed], cell.recipes[seed], 2.0 + number / 3 + seed / 7)
    write_table(tmp_path / "losses.csv", rows_of(found, experiment))
    told = results(found)
    shutil.rmtree(experiment.output)
    return path, told, tmp_path / "losses.csv"


def run_tool(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["experiment.py", *map(str, words)])
    return tool.main()


def test_a_table_says_what_the_run_directories_said(elsewhere, capsys, monkeypatch):
    path, told, table = elsewhere
    experiment = load_experiment(path)
    assert results(cells(experiment, path, [], Known([table]))) == told
    assert run_tool(monkeypatch, path, "--report", "--known", table) == 0
    assert read_table(Path(experiment.output) / "losses.csv") == read_table(table)
    assert run_tool(monkeypatch, path, "--print", "--known", table) == 0
    assert "pretrain.py" not in capsys.readouterr().out


def test_what_a_table_lacks_is_run(elsewhere, capsys, monkeypatch):
    path, _, table = elsewhere
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines[:3], *lines[4:]]))
    capsys.readouterr()
    assert run_tool(monkeypatch, path, "--print", "--known", table) == 0
    (left,) = capsys.readouterr().out.strip().splitlines()
    labels = read_table(table)[2].labels
    assert f"model.hidden={labels['width']}" in left and "seed=1" in left


def test_a_run_directory_comes_before_the_table(elsewhere):
    path, _, table = elsewhere
    cell = cells(load_experiment(path), path, [], Known([table]))[0]
    finish(cell.trials[1], cell.recipes[1], 9.0)
    assert (cell.loss(1), cell.loss(2)) == (9.0, 2.0 + 2 / 7)


def test_a_standard_error_is_known_too(elsewhere):
    path, _, table = elsewhere
    rows = read_table(table)
    write_table(table, [rows[0].model_copy(update={"standard_error": 0.25}), *rows[1:]])
    first = cells(load_experiment(path), path, [], Known([table]))[0]
    assert first.ended(1)["standard_error"] == 0.25 and "standard_error" not in first.ended(2)


@pytest.mark.parametrize("name", ["tokens", "weights", "active_weights"])
def test_a_table_of_another_grid_is_refused(elsewhere, name):
    path, _, table = elsewhere
    rows = read_table(table)
    other = rows[0].model_copy(update={name: getattr(rows[0], name) * 2})
    write_table(table, [other, *rows[1:]])
    with pytest.raises(ValueError, match=f"width=32, sparsity=0, seed=1 has {name} .* of another"):
        cells(load_experiment(path), path, [], Known([table]))


def test_a_run_with_two_losses_is_refused(elsewhere):
    _, _, table = elsewhere
    rows = read_table(table)
    write_table(table, [*rows, rows[3].model_copy(update={"loss": 1.5})])
    with pytest.raises(ValueError, match="width=32, sparsity=0.75, seed=2, which is in .*losses"):
        Known([table])
    write_table(table, rows)
    write_table(other := table.with_name("other.csv"), rows[3:4])
    with pytest.raises(ValueError, match="other.csv has width=32, .* which is in .*losses.csv al"):
        Known([table, other])


def test_tables_are_taken_together(elsewhere, capsys, monkeypatch):
    path, told, table = elsewhere
    rows = read_table(table)
    write_table(table, rows[:5])
    write_table(other := table.with_name("other.csv"), rows[5:])
    assert results(cells(load_experiment(path), path, [], Known([table, other]))) == told
    assert run_tool(monkeypatch, path, "--print", "--known", table, "--known", other) == 0
    assert "pretrain.py" not in capsys.readouterr().out


def test_a_search_goes_on_with_what_another_machine_tried(grid, tmp_path):
    path = grid(axes={"width": AXES["width"]}, tune={"optimizer.lr": 2})
    experiment = load_experiment(path)

    def grown(known=None):
        return tuned_cells(experiment, path, [], *([known] if known else []))

    there = grown()
    for cell in there:
        for trial in cell.left(()):
            seed, lr = trial.values["seed"], trial.values["optimizer.lr"]
            own = next(c for c in cell.seen if trial in c.trials.values())
            finish(trial, own.recipes[seed], 2.0 + abs(lr - 2e-3))
    write_table(tmp_path / "tried.csv",
                rows_of([point for cell in there for point in cell.seen], experiment))
    wanted = [[t.output for t in cell.left(())] for cell in there]
    assert all(wanted)
    shutil.rmtree(experiment.output)
    here = grown(Known([tmp_path / "tried.csv"]))
    assert [[t.output for t in cell.left(())] for cell in here] == wanted
    assert [t.output for cell in grown() for t in cell.left(())] != sum(wanted, [])


def test_fine_tuning_needs_more_than_a_table(grid, tmp_path, capsys, monkeypatch):
    own = ROOT / "configs/experiments/e2e_ordering.yaml"
    assert run_tool(monkeypatch, own, "--print", "--known", tmp_path / "losses.csv") == 2
    assert "fine-tuning begins with the checkpoints" in capsys.readouterr().err


def test_cells_without_a_finished_run_are_counted_and_not_listed(elsewhere, capsys, monkeypatch):
    path, _, table = elsewhere
    rows = read_table(table)
    write_table(table, rows[:3])  # one cell, and one of the two runs of another
    assert run_tool(monkeypatch, path, "--report", "--known", table) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| 32")] == [
        "2", "1 of 2"]
    assert lines[-1] == "2 of 4 cells have no finished run yet." and "| 64" not in str(lines)
    everything = (Path(load_experiment(path).output) / "results.json").read_text()
    assert everything.count('"labels"') == 4
