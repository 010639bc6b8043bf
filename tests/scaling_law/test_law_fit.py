"""Fitting the law: known coefficients from runs without noise, doubts where the data leave them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml

from megatron_spdf.runs.budget import average_weights
from megatron_spdf.runs.law_points import point_of
from megatron_spdf.runs.measured import read_run
from megatron_spdf.scaling_law.fit import fit_law, shortcomings
from megatron_spdf.scaling_law.law import PUBLISHED
from megatron_spdf.scaling_law.points import Point
from megatron_spdf.scaling_law.render import render_fit

LAW = PUBLISHED["t5"]
GRID = [(s, n, d) for s in (0.0, 0.5, 0.75, 0.875) for n in (1.3e6, 5.3e6, 2.1e7, 8.5e7)
        for d in (1.6e10, 3.3e10, 6.6e10)]


def points(law=LAW, noise: float = 0.0, grid=GRID) -> list[Point]:
    random = np.random.default_rng(1)
    return [Point(s, n, d,
                  float(law.loss(s, n, d)) * float(np.exp(noise * random.standard_normal())))
            for s, n, d in grid]


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_coefficients_are_recovered(name):
    law = PUBLISHED[name]
    grid = GRID if name == "t5" else [(s, n, d / 30) for s, n, d in GRID]
    fitted = fit_law(points(law, grid=grid), starts=8, samples=3)
    assert len(fitted.law.coefficients) == 7
    for coefficient, value in fitted.law.coefficients.items():
        assert value == pytest.approx(getattr(law, coefficient),
                                                                 rel=1e-4), coefficient
    assert fitted.error < 1e-8 and not fitted.doubts


@pytest.mark.slow
def test_noise_leaves_the_gain_and_widens_the_intervals():
    fitted = fit_law(points(noise=0.003), starts=8, samples=20)
    gain, low, high = fitted.gains[0.75]
    assert gain == pytest.approx(LAW.equivalent_dense(0.75), rel=0.1) and low < gain < high
    assert fitted.error == pytest.approx(0.003, rel=0.4)
    assert all(high > low for low, high in fitted.interval.values())
    # three lengths, a factor of four apart, at 0.3% noise
    assert any("b_d" in doubt for doubt in fitted.doubts)
    assert "DOUBT" in render_fit(fitted)


def test_an_outlier_does_not_move_the_fit():
    spoilt = points()
    spoilt[7] = Point(*list(asdict(spoilt[7]).values())[:3], spoilt[7].loss * 1.2)
    assert fit_law(spoilt, starts=8, samples=1).gains[0.75][0] == pytest.approx(2.16, abs=0.01)


@pytest.mark.parametrize(("grid", "said"), [
    (GRID[:2], "2 runs for 7 coefficients"),
    ([g for g in GRID if g[0] in (0.0, 0.75)], "2 different sparsities; at least 3"),
    ([g for g in GRID if g[1] == 1.3e6], "1 different numbers of non-zero weights"),
    ([g for g in GRID if g[2] != 1.6e10], "2 different amounts of data"),
])
def test_under_determined_fits_are_refused(grid, said):
    assert said in "; ".join(shortcomings(points(grid=grid)))
    with pytest.raises(ValueError, match="under-determined by these runs"):
        fit_law(points(grid=grid))


def test_equal_losses_determine_nothing():
    """Nor does a law overflow whose losses hardly depend on the size."""
    equal = [replace(point, loss=4.0) for point in points()]
    with pytest.raises(ValueError, match="1 different losses; at least 3 are needed"):
        fit_law(equal)
    for b_n in (1e-6, 0.0):
        assert replace(LAW, b_n=b_n).equivalent_dense(0.9) == math.inf


@pytest.fixture
def run(recipe, tmp_path):
    """A finished run's directory; returns (recipe, writer of its log)."""
    r = recipe(sparsity=0.75)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.yaml").write_text(yaml.safe_dump(r.model_dump()))

    def log(steps: int, *more: dict) -> None:
        lines = [{"kind": "train", "step": s, "tokens": s * r.tokens_per_step,
                  "loss": 9.0 - 0.1 * s,
                  "step_seconds": 1.0} for s in range(1, steps + 1)]
        (tmp_path / "a" / "log.jsonl").write_text("".join(json.dumps(x) + "\n"
                                                          for x in [*lines, *more]))
        return tmp_path / "a"
    return r, log


def test_a_run_is_a_point(run):
    r, log = run
    point = point_of(read_run(log(r.steps, {"kind": "valid", "step": r.steps, "loss": 4.5})))
    block = 12 * r.model.layers * r.model.hidden**2
    assert (point.nonzero, point.sparsity) == (block // 4, 0.75)
    assert (point.data, point.loss) == (r.steps * r.tokens_per_step, 4.5)
    assert (point.name, point.algorithm, point.average) == ("a", "static", block / 4)


def test_a_run_that_is_pruned_as_it_trains_has_more_weights_on_average(run, recipe):
    """Than at its end: as many as `average_weights` counts, which tests/runs holds by hand."""
    r, log = run
    pruned = recipe(sparsity={"level": 0.75, "algorithm": "gmp", "update": {"every": 1}})
    (log(r.steps) / "recipe.yaml").write_text(yaml.safe_dump(pruned.model_dump()))
    point = point_of(read_run(log(r.steps)))
    block = 12 * r.model.layers * r.model.hidden**2
    assert (point.algorithm, point.nonzero) == ("gmp", block // 4)
    assert point.average == average_weights(pruned) > 1.2 * point.nonzero


def test_of_several_validation_losses_the_last_counts(run):
    r, log = run
    evaluated = [{"kind": "valid", "step": r.steps - back, "loss": loss}
                 for back, loss in ((2, 5.0), (1, 4.0), (0, 4.5))]
    assert point_of(read_run(log(r.steps, *evaluated))).loss == 4.5


def test_without_validation_the_last_tenth_counts(run):
    r, log = run
    assert point_of(read_run(log(r.steps))).loss == pytest.approx(9.0 - 0.1 * r.steps)


def test_an_unfinished_run_is_no_point(run):
    r, log = run
    with pytest.raises(ValueError, match=f"is at step 3 of {r.steps}"):
        point_of(read_run(log(3)))


@pytest.mark.parametrize("change", [{"loss": math.nan}, {"loss": -1.0}, {"loss": math.inf},
                                    {"data": 0.0}, {"nonzero": 0.0}, {"sparsity": 1.0}])
def test_a_point_that_is_no_positive_number_is_refused(change):
    there = points()
    with pytest.raises(ValueError, match="the run bad has"):
        fit_law([*there, replace(there[0], name="bad", **change)], starts=1, samples=1)


def test_a_fit_that_failed_from_every_start_is_no_fit(monkeypatch):
    monkeypatch.setattr("megatron_spdf.scaling_law.fit._minimize",
                        lambda data, start: (start, math.inf))
    with pytest.raises(ValueError, match="failed from all 3 starting points"):
        fit_law(points(), starts=3, samples=1)


def test_a_run_that_diverged_is_no_point(run):
    r, log = run
    read = read_run(log(r.steps, {"kind": "valid", "step": r.steps, "loss": math.nan}))
    assert point_of(read) is None
    assert "1 valid record without a finite loss is left out, the first at step" in read.notes[0]
