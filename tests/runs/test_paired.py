"""Differences to a baseline are those of the same seeds."""

from __future__ import annotations

import math

import pytest
from test_experiment import finish, grid_of
from test_experiment import grid as grid  # a fixture

from megatron_spdf.reports import learning_curves
from megatron_spdf.runs.experiment import render, results
from megatron_spdf.runs.paired import difference_column, with_differences

AXES = {"size": {"s": {"model.hidden": 32}, "m": {"model.hidden": 64}},
        "masks": {"dense": {"sparsity.level": 0}, "75%": {"sparsity.level": 0.75}}}
LOSSES = {("s", "dense"): [2.0, 3.0, 4.0], ("s", "75%"): [2.1, 3.2, 4.3], ("m", "dense"): [1.0],
          ("m", "75%"): [1.5, 9.0]}


@pytest.fixture
def rows(grid):
    """Experiment and rows: losses of seeds far apart, and differences of 0.1, 0.2 and 0.3."""
    experiment, found = grid_of(grid(seeds=(1, 2, 3), axes=AXES))
    for cell in found:
        for (seed, trial), loss in zip(cell.trials.items(), LOSSES[*cell.labels.values()],
                                       strict=False):
            finish(trial, cell.recipes[seed], loss)
    experiment = experiment.model_copy(update={"baseline": {"masks": "dense"}})
    return experiment, with_differences(experiment, results(found))


def test_differences_are_those_of_seeds_that_both_have(rows):
    experiment, (dense, sparse, _, other) = rows
    assert dense["difference"] is None and dense["difference_interval"] is None
    assert sparse["difference"] == pytest.approx(0.2)
    # Student's t at 97.5% and two degrees of freedom is 4.3027, the spread 0.1
    assert sparse["difference_interval"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert sparse["interval"] > 10 * sparse["difference_interval"]
    assert (other["difference"], other["difference_interval"]) == (0.5, None)  # of one seed
    table = render(experiment, rows[1], difference_column(experiment))
    assert "less that of dense" in table and "+0.2000 ± 0.2484 |" in " ".join(table.split())
    assert "Differences are those of the same seeds" in table


def test_without_a_baseline_nothing_is_compared(rows):
    experiment = rows[0].model_copy(update={"baseline": None})
    assert difference_column(experiment) == [] and with_differences(experiment, []) == []
    assert "Differences" not in render(experiment, rows[1])


def test_a_curve_is_the_mean_of_stretches_of_finished_runs(grid, tmp_path):
    experiment, found = grid_of(grid(seeds=(1, 2), axes={"masks": AXES["masks"]}))
    for cell in found:
        trial = cell.trials[1]
        finish(trial, cell.recipes[1], 2.0)
        lines = (trial.output / "log.jsonl").read_text()
        (trial.output / "log.jsonl").write_text("".join(
            f'{{"kind": "train", "step": {i}, "tokens": {i}, "flops": {10 * i}, "loss": {i}}}\n'
            for i in range(1, 101)) + lines.splitlines()[-1] + "\n")
    (curves,) = learning_curves._curves(found[0])
    assert curves[0] == pytest.approx([40.0, 2.5]) and curves[-1] == pytest.approx([1000.0, 98.5])
    assert curves.shape == (learning_curves.STRETCHES, 2)
    learning_curves.plot_curves(found, ["masks"], "masks", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
