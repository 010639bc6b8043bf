"""The table of final losses has every figure of a run to the last digit, and is refused damaged."""

from __future__ import annotations

import json

import pytest
from test_experiment import RECIPE, finish
from test_experiment import grid as grid  # a fixture  # noqa: PLC0414

from megatron_spdf.runs.experiment import cells, load_experiment
from megatron_spdf.runs.loss_table import read_table, rows_of, write_table
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.sparsity.plan import Plan

MASKS = {"dense": {"sparsity.level": 0}, "set, slow": {
    "sparsity.level": 0.75, "sparsity.algorithm": "set", "sparsity.update.every": 2}}


def finished(path) -> tuple[list, list]:
    """Cells of an experiment with losses of their own, and the rows of their table."""
    experiment = load_experiment(path)
    found = cells(experiment, path, [])
    for number, cell in enumerate(found):
        for seed, trial in cell.trials.items():
            finish(trial, cell.recipes[seed], 2.0 + number / 3 + seed / 7)
    return found, rows_of(found, experiment.model_copy(update={"hold_out": [{"masks": "dense"}]}))


def test_a_row_has_the_figures_of_its_run(grid):
    found, rows = finished(grid(axes={"masks": MASKS}))
    assert len(rows) == 4 and [row.held_out for row in rows] == [True, True, False, False]
    dense, sparse = rows[0], rows[3]
    weights = 24 * RECIPE["model"]["hidden"]**2
    assert (dense.algorithm, dense.sparsity, dense.active_weights) == ("dense", 0.0, weights)
    assert (sparse.algorithm, sparse.sparsity, sparse.seed) == ("set", 0.75, 2)
    assert (sparse.weights, sparse.active_weights, sparse.average_weights) == (
        weights, weights / 4, weights / 4)
    recipe = found[1].recipes[2]
    assert sparse.tokens == recipe.train.tokens and sparse.flops == recipe.train.tokens * (
        training_flops(recipe.model, recipe.train.sequence_length, Plan.of(recipe)).total)
    assert sparse.loss == 2.0 + 1 / 3 + 2 / 7 and sparse.standard_error is None
    point = sparse.point
    assert (point.group, point.nonzero, point.loss) == ("set 0.75", weights / 4, sparse.loss)
    assert rows[2].point.cell != point.cell  # another seed


def test_the_standard_error_is_that_of_the_evaluation(grid):
    found, _ = finished(path := grid(axes={"masks": MASKS}, seeds=[1]))
    log = found[0].trials[1].output / "log.jsonl"
    first, last = map(json.loads, log.read_text().splitlines())
    log.write_text(f"{json.dumps(first)}\n{json.dumps(last | {'standard_error': 0.0123})}\n")
    row, other = rows_of(found, load_experiment(path))
    assert (row.standard_error, other.standard_error) == (0.0123, None)


def test_a_table_is_read_as_it_was_written(grid, tmp_path):
    _, rows = finished(grid(axes={"masks": MASKS}))
    rows[1] = rows[1].model_copy(update={"standard_error": 0.1 + 0.2, "flops": 1e17 / 3})
    write_table(tmp_path / "losses.csv", rows)
    assert read_table(tmp_path / "losses.csv") == rows
    assert (tmp_path / "losses.csv").read_text().startswith("masks,algorithm,sparsity,weights,")
    write_table(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()
    spreadsheet = (tmp_path / "losses.csv").read_text().replace("\n", "\r\n")
    (tmp_path / "losses.csv").write_bytes(spreadsheet.encode("utf-8-sig"))
    assert read_table(tmp_path / "losses.csv") == rows
    labels = {"sparsity": "as asked", "seed": "x"}  # axes with the names of columns
    named = [row.model_copy(update={"labels": labels}) for row in rows]
    write_table(tmp_path / "named.csv", named)
    assert read_table(tmp_path / "named.csv") == named


@pytest.mark.parametrize(("old", "new", "said"), [
    ("algorithm,", "algorithms,", "its last columns must be"),
    ("seed,", "loss,", "its last columns must be"),
    ("dense,dense,0,", "dense,dense,many,", "sparsity='many'"),
    ("dense,dense,0,", "dense,dense,nan,", "sparsity"),
    ("dense,dense,0,", "dense,0,", "line 2 has another number of values"),
    ("dense,dense,0,", '"dense,dense,0,', "is no table of losses"),
    ("dense,dense,0,", "dense,dense,1,", "sparsity"),
    ("dense,dense,0,", "{first}\ndense,dense,0,", "line 3 is line 2 again"),
])
def test_a_damaged_table_is_refused(grid, tmp_path, old, new, said):
    _, rows = finished(grid(axes={"masks": MASKS}))
    write_table(path := tmp_path / "losses.csv", rows)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new.format(first=text.splitlines()[1]), 1))
    with pytest.raises(ValueError) as caught:
        read_table(path)
    assert said in str(caught.value) and "losses.csv" in str(caught.value)


