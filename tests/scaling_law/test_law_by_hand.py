"""Law and fit figure by figure: the published coefficients, rows of the table, the objective and
its slopes, quantiles and doubts, the curves of the plot."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.optimize import check_grad

from megatron_spdf.runs import law_points
from megatron_spdf.runs.law_points import point_of
from megatron_spdf.scaling_law import fit as fitting
from megatron_spdf.scaling_law.fit import DELTA, Fit, fit_law, shortcomings
from megatron_spdf.scaling_law.forms import FORMS, Law
from megatron_spdf.scaling_law.law import (
    CAVEAT,
    PUBLISHED,
    ScalingLaw,
    _iso_flop_curves,
    _optimal_contours,
    cost_multiplier,
    describe_law,
    render_law,
)
from megatron_spdf.scaling_law.points import Point, render_points
from megatron_spdf.scaling_law.render import render_fit

FORM, COEFFICIENTS = FORMS["published"], ["a_s", "b_s", "c_s", "b_n", "a_d", "b_d", "c"]
LAW = ScalingLaw(2.0, 0.5, 3.0, 0.25, 5.0, 2.0, 0.75)
POINTS = [Point(s, n, d, float(LAW.loss(s, n, d)) * (1 + 0.01 * ((i * 7) % 5 - 2)), f"run{i}")
          for i, (s, n, d) in enumerate((s, n, d) for s in (0.0, 0.4, 0.8)
                                        for n in (50.0, 200.0, 700.0) for d in (3.0, 8.0, 20.0))]
RANDOM = np.random.default_rng(2)


@pytest.mark.parametrize("count", [5, 8, 12, 60])
def test_an_interval_has_losses_about_the_fit_as_the_coefficients_leave_them(count):
    """A fit of k coefficients leaves (n - k) / n of the variance of n losses."""
    law = Law(FORM, dict(zip(COEFFICIENTS, astuple(LAW), strict=False)))
    laws = [replace(law, coefficients={**law.coefficients, "c": c}) for c in (0.7, 0.75, 0.9)]
    residuals = np.random.default_rng(count).exponential(0.02, count)  # to one side
    spare = max(1, count - 7)
    held_out = [Point(0.5, 100.0, 10.0, math.nan, "new"), Point(0.8, 50.0, 30.0, 2.5, "done")]
    found = fitting._predictions(law, laws, residuals, held_out)
    for i, (prediction, point) in enumerate(zip(found, held_out, strict=True)):
        losses = [each.predict(held_out)[i] / math.exp(r * math.sqrt(count / spare))
                  for each in laws for r in residuals]
        assert (prediction.low, prediction.high) == pytest.approx(
            tuple(np.quantile(losses, (0.05, 0.95))))
        assert prediction.predicted == law.predict(held_out)[i] and prediction.name == point.name
    assert (found[0].measured, found[1].measured) == (None, 2.5)


def test_a_resampling_has_whole_cells_and_some_of_every_group():
    points = [Point(s, 50.0, 3.0, 2.0, cell=cell) for s, cell in (
        (0.0, "a"), (0.5, "c"), (0.0, "a"), (0.0, "b"), (0.0, "b"), (0.5, "c"), (0.8, ""),
        (0.0, ""))]
    cells, seen = [(0, 2), (3, 4), (1, 5), (6,), (7,)], set()
    draw = fitting._resampling(points, np.random.default_rng(0))
    for _ in range(200):
        counts = Counter(draw().tolist())
        drawn = [{counts[i] for i in cell} for cell in cells]
        assert all(len(times) == 1 for times in drawn) and sum(map(sum, drawn)) == len(cells)
        assert counts[1] and counts[6]  # the only ones of their groups
        seen.add(tuple(sorted(counts.items())))
    assert len(seen) > 20


def test_coefficients_are_the_published_ones():
    assert astuple(PUBLISHED["t5"]) == (16.8, 0.722, 45.0, 0.245, 6.9e8, 0.203, 0.651, "tokens")
    assert astuple(PUBLISHED["vit"]) == (294.0, 0.821, 468.0, 0.392, 2.37e8, 0.89, 4.517, "images")


def test_the_law_by_hand():
    """N = 16 and D = 10: (2 (1 - 3/4)^(1/2) + 3) / 2 + (5 / 10)^2 + 0.75."""
    assert LAW.loss(0.75, 16, 10) == pytest.approx((2 * 0.5 + 3) / 2 + 0.25 + 0.75)
    assert LAW.equivalent_dense(0.75) == pytest.approx((5 / 4) ** 4)
    assert cost_multiplier("dense")(0.75) == 4.0
    # dense for a quarter, then on average 3/4 of the way down for a half, then sparse
    assert cost_multiplier("gmp")(0.8) == pytest.approx((0.25 + 0.5 * (1 - 0.6) + 0.05) / 0.2)


def test_rows_of_the_table_are_of_one_budget():
    facts = describe_law(LAW, "mine", nonzero=100.0, compute=9000.0)
    assert [row["sparsity"] for row in facts["rows"]] == [0.0, 0.5, 0.75, 0.875, 0.9]
    for row in facts["rows"]:
        s = row["sparsity"]
        assert row["data"] == pytest.approx(15.0 * (1 - s))
        assert row["data_gmp"] == pytest.approx(15.0 / row["gmp_cost"])
        assert row["gmp_cost"] == pytest.approx((0.25 + 0.5 * (1 - 0.75 * s) + 0.25 * (1 - s))
                                                / (1 - s))
        assert row["loss"] == pytest.approx(LAW.loss(s, 100, row["data"]))
        assert row["loss_gmp"] == pytest.approx(LAW.loss(s, 100, row["data_gmp"]))
        assert row["equivalent_dense"] == LAW.equivalent_dense(s)
    assert facts["optimal_sparsity"] == LAW.optimal_sparsity(100.0, 9000.0) > 0.0
    assert facts["optimal_sparsity_gmp"] == LAW.optimal_sparsity_numeric(100.0, 9000.0, "gmp")


def test_the_table_as_text():
    said = render_law(describe_law(PUBLISHED["t5"], "t5", 1e8, 1e21)).removeprefix(CAVEAT)
    lines = said.strip().splitlines()
    assert lines[:2] == [
        "L(S, N, D) = (16.8 (1 - S)^0.722 + 45) N^-0.245 + (6.9e+08 / D)^0.203 + 0.651     (t5, D "
        "in tokens)", "N = 1e+08 non-zero linear weights, C = 1e+21 training FLOPs"]
    row = next(line for line in lines if line.strip().startswith("75.0%"))
    assert row.split() == ["75.0%", "2.16x", "4.000", "4.17e+11", "1.4847", "2.125", "7.84e+11",
                           "1.4518"]
    assert lines[-1] == ("least loss at the dense cost: S = 0.7142; by gradual pruning: S = "
                         "0.8168")


def test_the_objective_is_the_mean_huber_loss_of_log_losses(monkeypatch):
    """By its definition (Huber 1964), also where a residual is outside of delta, with its slopes
    those of differences."""
    data, called = fitting._Data.of(POINTS, FORM), []
    monkeypatch.setattr(fitting, "minimize", lambda f, x, **options: called.append((f, options))
                        or SimpleNamespace(x=x, fun=f(x)[0]))
    for scale in (1e-4, 0.3):  # few residuals outside, or all
        exact = np.log([LAW.a_s / data.unit_n**LAW.b_n, LAW.b_s, LAW.c_s / data.unit_n**LAW.b_n,
                        LAW.b_n, LAW.a_d / data.unit_d, LAW.b_d, LAW.c])
        x = exact + scale * RANDOM.standard_normal(7)
        end, least = fitting._minimize(data, x)
        predicted = [data.law(x).published.loss(p.sparsity, p.nonzero, p.data)
                     for p in POINTS]
        r = np.abs(np.log(predicted) - np.log([p.loss for p in POINTS]))
        huber = np.where(r <= DELTA, r**2 / 2, DELTA * (r - DELTA / 2)).mean() / DELTA**2
        assert least == pytest.approx(huber) and end is x
        objective, options = called[-1]
        slope = objective(x)[1]
        assert check_grad(lambda v, f=objective: f(v)[0], lambda v, f=objective: f(v)[1],
                          x) < 1e-3 * np.linalg.norm(slope)
        assert options["jac"] is True and options["method"] == "BFGS"
    assert DELTA == 1e-3


def test_a_fit_is_measured_by_its_law():
    fitted = fit_law(POINTS, starts=2, samples=2)
    law = fitted.law.published
    errors = [np.log(law.loss(p.sparsity, p.nonzero, p.data) / p.loss) for p in POINTS]
    assert fitted.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-6)
    assert list(fitted.gains) == [0.4, 0.8] and list(fitted.interval) == COEFFICIENTS
    assert fitted.gains[0.8][0] == law.equivalent_dense(0.8)
    assert fitted.law.predict(POINTS) == pytest.approx([law.loss(p.sparsity, p.nonzero, p.data)
                                                        for p in POINTS])
    assert fit_law(POINTS, starts=2, samples=2) == fitted


def fitted_as(law: ScalingLaw) -> Law:
    return Law(FORM, {key: getattr(law, key) for key in COEFFICIENTS})


def laws(values) -> list[Law]:
    return [fitted_as(replace(LAW, b_d=float(value))) for value in values]


def test_intervals_are_the_quantiles_of_5_and_95_percent():
    found = fitting._intervals(laws(np.linspace(0, 100, 101)[::-1]))
    assert found["b_d"] == pytest.approx((5.0, 95.0)) and found["c"] == (0.75, 0.75)
    gains = fitting._gains(
        fitted_as(LAW), [fitted_as(replace(LAW, b_n=b)) for b in np.linspace(0.2, 0.4, 101)],
        [*POINTS, Point(0.80001, 1.0, 1.0, 1.0)])
    assert list(gains) == [0.4, 0.8]  # to four digits
    high, low = (replace(LAW, b_n=b).equivalent_dense(0.8) for b in (0.21, 0.39))
    assert gains[0.8] == pytest.approx((LAW.equivalent_dense(0.8), low, high))


@pytest.mark.parametrize(("high", "doubted"), [(1.99, False), (2.01, True), (-1.0, True)])
def test_quantiles_a_factor_of_two_apart_are_doubted(high, doubted):
    data = fitting._Data.of(POINTS, FORM)
    best = np.log([LAW.a_s / data.unit_n**LAW.b_n, LAW.b_s, LAW.c_s / data.unit_n**LAW.b_n,
                   LAW.b_n, LAW.a_d / data.unit_d, LAW.b_d, LAW.c])
    found = fitting._doubts(data, best, laws([1.0] * 50 + [high] * 50))
    assert [doubt.split(":")[0] for doubt in found] == ["b_d"] * doubted


def test_coefficients_that_can_change_together_are_named():
    """Those of the two capacities that two sparsities give: a (1 - S)^b + c at S = 0 and 0.5 stays
    where a grows by da, c falls by as much, and b falls such that a 0.5^b falls by da too."""
    points = [replace(p, sparsity=0.5 if p.sparsity else 0.0) for p in POINTS]
    data, x = fitting._Data.of(points, FORM), np.log([1.0, 0.5, 1.5, 0.25, 1.0, 2.0, 0.75])
    (found,) = fitting._doubts(data, x, laws([LAW.b_d]))
    half = 0.5**0.5
    # in logarithms of a, b, c, for da = 1
    moved = np.array([1.0, (half - 1.0) / (half * np.log(0.5) * 0.5) * -1.0, -1 / 1.5])
    moved /= np.linalg.norm(moved)
    named = [k for k, part in zip(("a_s", "b_s", "c_s"), moved, strict=True) if abs(part) > 0.3]
    assert found.startswith(f"{', '.join(named)} can change together")
    assert not fitting._doubts(fitting._Data.of(POINTS, FORM), x, laws([LAW.b_d]))


@pytest.mark.parametrize(("count", "said"), [(7, 0), (6, 1)])
def test_seven_coefficients_need_seven_runs_of_three_values_each(count, said):
    grid = [Point(s, n, d, 1.0 + s) for s, n, d in (
        (0.0, 1, 1), (0.5, 2, 2), (0.75, 3, 3), (0, 1, 2), (0.5, 1, 3), (0.75, 2, 1), (0, 2, 3))
        ][:count]
    assert len(shortcomings(grid)) == said
    near = [replace(p, sparsity=round(p.sparsity / 1e5, 6)) for p in grid]  # one, to four digits
    assert any("1 different sparsities" in text for text in shortcomings(near))


def test_tables_of_runs_and_of_a_fit():
    text = render_points([Point(0.75, 1234567.0, 2.5e9, 2.34567, "a")])
    assert text.splitlines()[-1].split() == ["a", "75.00%", "1,234,567", "1,234,567",
                                            "2.5e+09", "2.3457"]
    said = render_fit(Fit(fitted_as(LAW), 0.00123, {"b_d": (1.0, 3.0)}, {0.75: (2.1, 2.0, 2.2)},
                          ["no"], []))
    assert said.splitlines()[1:5] == [
        "fitted, root mean square error of log losses 1.23e-03; in brackets 5% and 95% of "
        "bootstrap:", "  b_d = 2            [1, 3]",
        "  a model of sparsity 75.0% equals a dense one of 2.100x its non-zero weights [2.000, "
        "2.200]; published, of GMP: 2.16x", "  DOUBT: no"]


def run_of(records, valid, recipe):
    return SimpleNamespace(finished=True, recipe=recipe, train=records, valid=valid, name="a",
                           plan=SimpleNamespace(numel=0, active=0), directory="a")


@pytest.mark.parametrize(("count", "tenth"), [(5, 1), (19, 1), (20, 2), (39, 3)])
def test_without_validation_the_mean_of_the_last_tenth_counts(recipe, count, tenth):
    records = [{"step": i, "tokens": 10 * i, "loss": float(i * i)} for i in range(1, count + 1)]
    point = point_of(run_of(records, [], recipe()))
    assert point.loss == pytest.approx(np.mean([i * i for i in range(count - tenth + 1,
                                                                     count + 1)]))
    assert (point.data, point.sparsity) == (10 * count, 0.0)
    records[-1]["loss"] = None
    assert point_of(run_of(records, [], recipe())) is None


def test_curves_of_one_budget_and_their_optima():
    axes = Figure().subplots()
    law = PUBLISHED["t5"]
    _iso_flop_curves(law, axes)
    curves, marks = axes.lines[::2], axes.lines[1::2]
    assert len(curves) == len(marks) == 5
    for exponent, curve, mark in zip(range(18, 23), curves, marks, strict=True):
        levels, losses = curve.get_data()
        assert (levels[0], levels[-1]) == (0.0, 0.97)
        assert losses == pytest.approx(law.loss(levels, 1e8, 10**exponent * (1 - levels) / 6e8))
        (best,), (loss,) = mark.get_data()
        assert best == law.optimal_sparsity(1e8, 10**exponent)
        assert loss == pytest.approx(min(losses), rel=1e-3) or best > 0.97
        assert mark.get_color() == curve.get_color()
        assert curve.get_label() == f"$10^{{{exponent}}}$ FLOPs"
    assert "N = 1e+08" in axes.get_title()


def test_contours_are_of_both_costs():
    law, drawn, labels = PUBLISHED["t5"], [], []

    class Axes:
        def clabel(self, lines, fmt, fontsize):
            labels.append(fmt(0.875))

        def contour(self, n, c, best, **options):
            drawn.append((n, c, best, options))

        def __getattr__(self, name):
            return lambda *_, **__: None

    _optimal_contours(law, Axes())
    for (n, c, best, options), style, cost in zip(drawn, ("solid", "dashed"), ("dense", "gmp"),
                                                  strict=True):
        assert (n[0], n[-1], c[0], c[-1]) == pytest.approx((1e6, 1e10, 1e16, 1e25))
        assert best.shape == (19, 17) and options["linestyles"] == style
        assert options["levels"] == [0.25, 0.5, 0.75, 0.875]
        for i, j in ((9, 3), (14, 12)):
            assert best[i, j] == pytest.approx(law.optimal_sparsity_numeric(n[j], c[i], cost),
                                               abs=1e-5)
    assert labels == ["87.5%"] * 2


@pytest.mark.parametrize(("reached", "counted"), [(np.nan, np.inf), (np.inf, np.inf), (2.0, 2.0)])
def test_a_start_that_ran_away_is_never_the_best(monkeypatch, reached, counted):
    monkeypatch.setattr(fitting, "minimize", lambda f, x, **_: SimpleNamespace(x=x, fun=reached))
    assert fitting._minimize(fitting._Data.of(POINTS, FORM), np.zeros(7))[1] == counted


def test_a_run_without_a_finite_loss_is_left_out_and_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(law_points, "read_run", lambda path: SimpleNamespace(directory=path))
    monkeypatch.setattr(law_points, "point_of", lambda run: None)
    assert law_points.trainings([tmp_path / "run"], []) == []
    assert capsys.readouterr().err == (
        f"{tmp_path / 'run'} is left out: its loss at the end is not finite\n")


def test_a_training_of_two_files_is_no_two_trainings(monkeypatch, tmp_path):
    """As a copy of a table, or a run beside the table that it is in; a length of another run may
    have the same figures but for the loss."""
    row = SimpleNamespace(point=replace(POINTS[0], name="of a table"), held_out=False)
    monkeypatch.setattr(law_points, "read_table", lambda path: [row])
    monkeypatch.setattr(law_points, "read_run", lambda path: None)
    monkeypatch.setattr(law_points, "point_of", lambda run: POINTS[0])
    (tmp_path / "table.csv").touch()
    with pytest.raises(ValueError, match="of a table and .*run are one training, with the loss"):
        law_points.trainings([tmp_path / "table.csv", tmp_path / "run"], [])
    other = replace(POINTS[0], loss=POINTS[0].loss + 1e-9)
    monkeypatch.setattr(law_points, "point_of", lambda run: other)
    assert len(law_points.trainings([tmp_path / "table.csv", tmp_path / "run"], [])) == 2


@pytest.mark.parametrize("again", ["run", "run/.", "link"])
def test_a_run_that_is_named_twice_is_no_two_trainings(tmp_path, again):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(ValueError, match="are one; name it once"):
        law_points.trainings([tmp_path / "run", Path(f"{tmp_path}/{again}")], [])
