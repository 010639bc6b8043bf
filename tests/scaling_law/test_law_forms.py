"""Forms of the law: known coefficients from made runs, equivalent sizes by hand, held-out runs
within their intervals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_spdf.scaling_law.fit import Prediction, fit_law, shortcomings
from megatron_spdf.scaling_law.forms import FORMS, Law
from megatron_spdf.scaling_law.points import Point
from megatron_spdf.scaling_law.render import render_fit

SHARED = {"b_n": 0.3, "a_d": 4e5, "b_d": 0.5, "c": 1.5}
SIZES, LENGTHS = (2.5e4, 5e4, 9e4, 1.6e5, 3e5), (5, 10, 20, 40)
# algorithm, sparsity at the end, average over final number of weights
KINDS = [("dense", 0.0, 1.0), ("static", 0.5, 1.0), ("static", 0.75, 1.0), ("static", 0.875, 1.0),
         ("gmp", 0.75, 2.1)]
PUBLISHED = Law(FORMS["published"], {"a_s": 12.0, "b_s": 0.8, "c_s": 20.0, **SHARED})
AVERAGE = Law(FORMS["average"], {"a_n": 30.0, **SHARED})
# of equal loss at 1.5, 2, 2.5 and 2.2 times the weights of the dense one
GROUPS = Law(FORMS["groups"], {
    "k(dense)": 30.0, "k(gmp 0.75)": 30.0 * 2.2**-0.3, "k(static 0.5)": 30.0 * 1.5**-0.3,
    "k(static 0.75)": 30.0 * 2.0**-0.3, "k(static 0.875)": 30.0 * 2.5**-0.3, **SHARED})


def made(law: Law, noise: float = 0.0, seed: int = 0, of_cells: float = 0.0) -> list[Point]:
    """Runs whose losses follow a law.

    Args:
        noise: spread of the logarithm of a loss.
        of_cells: that of what the runs of a cell share.
    """
    random, found = np.random.default_rng(seed), []
    for algorithm, sparsity, ratio in KINDS if law is not PUBLISHED else KINDS[:4]:
        for size in SIZES:
            shared = of_cells * random.standard_normal()
            for length in LENGTHS:
                name = f"{algorithm} {sparsity} {size:g} x {length}"
                point = Point(sparsity, size, length * size, 1.0, name, ratio * size, algorithm,
                              f"{algorithm} {sparsity} {size:g}")
                error = np.exp(shared + noise * random.standard_normal())
                found.append(replace(point, loss=float(law.predict([point])[0] * error)))
    return found


@pytest.mark.parametrize("law", [PUBLISHED, AVERAGE, GROUPS], ids=lambda law: law.form.name)
def test_known_coefficients_are_recovered(law):
    fitted = fit_law(made(law), starts=6, samples=2, form=law.form)
    assert dict(fitted.law.coefficients) == pytest.approx(dict(law.coefficients), rel=1e-3)
    assert fitted.error < 1e-7


def test_the_average_counts_and_not_the_final_number():
    """L = 30 / (4e4)^0.3 + (4e5 / 1e6)^0.5 + 1.5, whatever the sparsity."""
    points = [Point(0.75, 1e4, 1e6, 1.0, average=4e4), Point(0.0, 4e4, 1e6, 1.0)]
    assert AVERAGE.predict(points) == pytest.approx([30 / 4e4**0.3 + 0.4**0.5 + 1.5] * 2)
    assert FORMS["average"].gains(AVERAGE, points) == {}


def test_equivalent_sizes_by_hand():
    """A group of factor K has the loss of a dense model of (K_dense / K)^(1 / b_N) N weights."""
    gains = GROUPS.form.gains(GROUPS, [])
    assert gains == pytest.approx({"gmp 0.75": 2.2, "static 0.5": 1.5, "static 0.75": 2.0,
                                   "static 0.875": 2.5})
    sparse = Point(0.75, 1e5, 3e6, 1.0)
    dense = Point(0.0, 2e5, 3e6, 1.0)
    assert GROUPS.predict([sparse]) == pytest.approx(GROUPS.predict([dense]))
    (gain,) = PUBLISHED.form.gains(PUBLISHED, [sparse]).values()
    assert gain == pytest.approx((32 / (12 * 0.25**0.8 + 20)) ** (1 / 0.3))
    without = {name: value for name, value in GROUPS.coefficients.items() if "dense" not in name}
    assert GROUPS.form.gains(Law(GROUPS.form, without), []) == {}


@pytest.mark.slow
@pytest.mark.parametrize("law", [AVERAGE, GROUPS], ids=lambda law: law.form.name)
def test_held_out_losses_are_within_their_intervals(law):
    """9 in 10 are: of 40 a run, 36 on average, with a spread of 1.9."""
    inside, count, noise = 0, 0, 0.004
    for seed in (1, 2):
        points = made(law, noise, seed)
        held_out = [p for i, p in enumerate(points) if i % 5 < 2]
        fitted = fit_law([p for p in points if p not in held_out], starts=3, samples=25,
                         form=law.form, held_out=held_out)
        assert [p.name for p in fitted.predictions] == [p.name for p in held_out]
        inside += sum(p.inside for p in fitted.predictions)
        count += len(held_out)
        assert all(p.low < p.predicted < p.high for p in fitted.predictions)
    assert count == 80 and 62 <= inside <= 79
    assert f"{sum(p.inside for p in fitted.predictions)} of 40 measured" in render_fit(fitted)


@pytest.mark.slow
def test_what_runs_of_a_cell_share_widens_the_intervals():
    points = made(GROUPS, noise=0.0005, of_cells=0.004)
    widths = [high - low for own in (points, [replace(p, cell="") for p in points])
              for _, low, high in [fit_law(own, 3, 25, form=GROUPS.form).gains["static 0.75"]]]
    assert widths[0] > 1.3 * widths[1]


def test_a_group_that_was_not_fitted_cannot_be_predicted():
    points = made(GROUPS)
    gmp = [p for p in points if p.algorithm == "gmp"]
    rest = [p for p in points if p.algorithm != "gmp"]
    with pytest.raises(ValueError, match=r"held-out runs are of gmp 0\.75, and no run"):
        fit_law(rest, 1, 1, form=FORMS["groups"], held_out=gmp)
    fitted = fit_law(rest, 3, 2, form=FORMS["average"], held_out=gmp)
    assert len(fitted.predictions) == len(gmp)


@pytest.mark.parametrize(("form", "count", "said"), [("average", 4, "4 runs for 5 coefficients"),
                                                     ("groups", 8, "8 runs for 9 coefficients")])
def test_each_form_needs_a_run_for_each_coefficient(form, count, said):
    points = made(GROUPS)[::3]
    spread = [next(p for p in points if p.group == group)
              for group in sorted({p.group for p in points})]
    few = [*spread, *(p for p in points if p not in spread)][:count]
    assert any(said in text for text in shortcomings(few, FORMS[form]))
    assert not shortcomings(points, FORMS[form])


def test_inside_is_between_the_quantiles():
    assert Prediction("a", 2.0, 1.9, 2.1, 2.1).inside
    assert not Prediction("a", 2.0, 1.9, 2.1, 2.11).inside
