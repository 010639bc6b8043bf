"""What a prediction of held-out cells is made of: the runs that a form is fitted to, how, and the
points that it is asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_experiment import RECIPE, finish
from test_experiment import grid as grid  # a fixture  # noqa: PLC0414

from megatron_spdf.runs import held_out
from megatron_spdf.runs.experiment import cells, load_experiment
from megatron_spdf.runs.held_out import predict, read_predictions, write_predictions
from megatron_spdf.runs.loss_table import rows_of
from megatron_spdf.scaling_law.forms import FORMS

AXES = {"size": {"s": {"model.hidden": 32}, "l": {"model.hidden": 64}},
        "masks": {"dense": {"sparsity.level": 0}, "75%": {"sparsity.level": 0.75},
                  "gmp": {"sparsity.level": 0.75, "sparsity.algorithm": "gmp",
                          "sparsity.update.every": 2}}}
LONG = RECIPE | {"train": RECIPE["train"] | {"tokens": 8 * 32 * 40}}


@pytest.fixture
def asked(grid, monkeypatch):
    """Predictions of all of one size, the rows of the whole table, and what `fit_law` was given."""
    path = grid(axes=AXES, recipe=LONG, hold_out=[{"size": "l"}])
    experiment = load_experiment(path)
    found, given = cells(experiment, path, []), {}
    for number, cell in enumerate(found):
        for seed, trial in cell.trials.items():
            finish(trial, cell.recipes[seed], 2.0 + number + seed / 10)

    def fit(points, starts, samples, seed=0, form=None, held_out=()):
        given[form.name] = (points, starts, samples, seed, form, held_out)
        return SimpleNamespace(predictions=[SimpleNamespace(
            predicted=3.12345 + i, low=2.54321 + i, high=3.98765 + i)
            for i in range(len(held_out))])

    monkeypatch.setattr(held_out, "fit_law", fit)
    monkeypatch.setattr(held_out, "shortcomings", lambda points, form: [])
    rows = rows_of(found, experiment)
    return predict(found, experiment, rows, 5, 7), rows, given


def test_every_form_is_fitted_to_the_other_runs_by_as_many_starts_and_samples_as_asked(asked):
    _, rows, given = asked
    assert list(given) == list(FORMS)
    for name, (points, *settings, form, _) in given.items():
        own = [row.point for row in rows if row.labels["size"] == "s"
               and (name != "published" or row.labels["masks"] != "gmp")]  # of one algorithm
        assert points == own and settings == [5, 7, 0] and form is FORMS[name]


def test_a_held_out_cell_is_asked_for_as_the_point_that_its_runs_will_be(asked):
    """But for its loss, its seed, and whose cell it is."""
    _, rows, given = asked
    seen = {row.labels["masks"]: replace(row.point, name="", cell="") for row in rows
            if row.labels["size"] == "l"}
    # gradual pruning has more weights on average than at its end
    assert seen["gmp"].average > 1.5 * seen["gmp"].nonzero == 1.5 * seen["75%"].average
    for name, (*_, points) in given.items():
        masks = ["dense", "75%"] if name == "published" else ["dense", "75%", "gmp"]
        if name == "groups":  # of a group that is known
            masks = [m for m in masks if seen[m].group in {p.group for p in given[name][0]}]
        assert [point.name for point in points] == [f"size=l,masks={m}" for m in masks]
        for point, mask in zip(points, masks, strict=True):
            assert math.isnan(point.loss)
            assert replace(point, name="", loss=seen[mask].loss) == seen[mask], (name, mask)


def test_a_prediction_is_of_its_cell_and_its_form_and_is_read_as_it_was_written(asked, tmp_path):
    found, _, given = asked
    for name, (points, *_, held) in given.items():
        own = [row for row in found if row.form == name]
        assert [",".join(map("=".join, row.labels.items())) for row in own] == [
            point.name for point in held]
        assert [(row.predicted, row.low, row.high, row.runs) for row in own] == [
            (3.12345 + i, 2.54321 + i, 3.98765 + i, len(points)) for i in range(len(held))]
    write_predictions(tmp_path / "p.csv", found)
    again = read_predictions(tmp_path / "p.csv")  # to six digits
    figures = [[(row.predicted, row.low, row.high) for row in rows] for rows in (again, found)]
    for one, other in zip(*figures, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    same = {"predicted": 1.0, "low": 1.0, "high": 1.0}
    assert [row.model_copy(update=same) for row in again] == [
        row.model_copy(update=same) for row in found]


def test_a_cell_is_asked_for_if_any_of_the_hold_outs_names_it(grid, monkeypatch):
    path = grid(axes=AXES, recipe=LONG, hold_out=[{"size": "l", "masks": "75%"},
                                                  {"masks": "dense"}])
    experiment, names = load_experiment(path), set()

    def fit(points, *settings, held_out, **others):
        names.update(point.name for point in held_out)
        return SimpleNamespace(predictions=[SimpleNamespace(predicted=3.0, low=2.0, high=4.0)
                                            for _ in held_out])

    monkeypatch.setattr(held_out, "fit_law", fit)
    monkeypatch.setattr(held_out, "shortcomings", lambda points, form: [])
    predict(cells(experiment, path, []), experiment, [], 5, 7)
    assert names == {"size=l,masks=75%", "size=l,masks=dense", "size=s,masks=dense"}
