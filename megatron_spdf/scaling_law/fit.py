"""Fits a form of the scaling law to a user's own runs: Huber loss on log losses, BFGS from many
starts, and bootstrap.

Symbols as in law.py and forms.py. Shapes: n runs, k coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.optimize import minimize

from megatron_spdf.scaling_law.forms import FORMS, LEVELS, SHARED, Form, Law
from megatron_spdf.scaling_law.points import Point, check_points
from megatron_spdf.text import counted

DELTA = 1e-3  # of the Huber loss on log losses, the paper's for T5
RANGE = (0.05, 0.95)  # quantiles that intervals go by
PUBLISHED = FORMS["published"]


@dataclass(frozen=True)
class Prediction:
    """Loss of a run that the law was not fitted to: predicted with its interval, and measured;
    None: not yet."""

    name: str
    predicted: float
    low: float
    high: float
    measured: float | None

    @property
    def inside(self) -> bool | None:
        return None if self.measured is None else self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Fit:
    """Fitted law and its uncertainty.

    Attributes:
        law: with the fitted coefficients.
        error: root mean square of log(predicted / measured).
        interval: coefficient -> 5% and 95% quantile over bootstrap samples.
        gains: sparsity or group -> equivalent dense size, with its quantiles; the data may
            determine these even where they do not determine the coefficients.
        doubts: reasons not to trust a coefficient, as sentences.
        predictions: of the runs that were held out.
    """

    law: Law
    error: float
    interval: dict[str, tuple[float, float]]
    gains: dict[str | float, tuple[float, float, float]]
    doubts: list[str]
    predictions: list[Prediction]

    def as_plain(self) -> dict[str, Any]:
        """Plain nested values, for JSON."""
        predictions = [{**asdict(p), "inside": p.inside} for p in self.predictions]
        return {"form": self.law.form.name, "law": dict(self.law.coefficients),
                "error": self.error, "interval": self.interval, "gains": self.gains,
                "doubts": self.doubts, "predictions": predictions}


def shortcomings(points: Sequence[Point], form: Form = PUBLISHED) -> list[str]:
    """Lists reasons why points cannot determine the coefficients. Empty if they may."""
    found, needed = [], len(form.of_factor(points)) + len(SHARED)
    if len(points) < needed:
        found.append(f"{counted(len(points), 'run')} for {needed} "
                     f"coefficients; at least {needed} are needed, and the published "
                     "fit had 48")
    levels = {**form.levels(points), "losses": {p.loss for p in points}}
    for what, values in levels.items():
        if len(values) < LEVELS:
            found.append(f"{len(values)} different {what}; at least {LEVELS} are needed to tell "
                         "scale, exponent and offset apart")
    return found


def fit_law(points: Sequence[Point], starts: int = 32, samples: int = 100, seed: int = 0,
            form: Form = PUBLISHED, held_out: Sequence[Point] = ()) -> Fit:
    """Fits a law.

    Args:
        points: finished runs.
        starts: number of random starting points; the best end counts.
        samples: bootstrap resamplings of the points, those of a cell together, each fitted from
            the best end.
        seed: of starting points and resamplings.
        form: of the law.
        held_out: runs whose losses are predicted; an interval has the spread of the fits and that
            of losses about the fit.

    Raises:
        ValueError: the points cannot determine the coefficients, are no positive numbers, or no
            start leads to a fit; a held-out run is of no group that was fitted.
    """
    check_points(points)
    check_points(held_out, predicted=True)
    missing = shortcomings(points, form)
    if missing:
        raise ValueError("the law is under-determined by these runs: " + "; ".join(missing))
    strange = {p.group for p in held_out} - {p.group for p in points}
    if strange and not set(form.of_factor(held_out)) <= set(form.of_factor(points)):
        raise ValueError(f"held-out runs are of {', '.join(sorted(strange))}, and no run that is "
                         "left is; hold out some of them only")
    random = np.random.default_rng(seed)
    data = _Data.of(points, form)
    ends = [_minimize(data, start)
            for start in random.uniform(-2.0, 1.0, size=(starts, len(data.names)))]
    best, least = min(ends, key=lambda end: end[1])
    if not np.isfinite(least):
        raise ValueError(f"no fit: the minimization failed from all {starts} starting points; "
                         "check the losses of the runs, or raise --starts")
    draw = _resampling(points, random)
    laws = [data.law(_minimize(data.take(draw()), best)[0]) for _ in range(samples)]
    law, residuals = data.law(best), data.residuals(best)[0]
    return Fit(law, float(np.sqrt(np.mean(residuals**2))), _intervals(laws),
               _gains(law, laws, points), _doubts(data, best, laws),
               _predictions(law, laws, residuals, held_out))


@dataclass(frozen=True)
class _Data:
    """Points in units of their geometric means, so that all coefficients are of the order of one.

    The vector x is the logarithms of the coefficients in these units, those of the factor K first,
    then b_N, a_D, b_D and c. The logarithm keeps all of them positive.
    """

    form: Form
    names: tuple[str, ...]
    design: ndarray
    nonzero: ndarray
    data: ndarray
    log_loss: ndarray
    unit_n: float
    unit_d: float

    @classmethod
    def of(cls, points: Sequence[Point], form: Form) -> _Data:
        """Scales points to their geometric means."""
        n, d, loss = (np.array(values, float) for values in zip(
            *((form.size(p), p.data, p.loss) for p in points), strict=True))
        unit_n, unit_d = (float(np.exp(np.mean(np.log(v)))) for v in (n, d))
        names = form.of_factor(points)
        return cls(form, (*names, *SHARED), form.design(points, names), n / unit_n, d / unit_d,
                   np.log(loss), unit_n, unit_d)

    def take(self, chosen: ndarray) -> _Data:
        """Resamples the points by index."""
        return replace(self, design=self.design[chosen], nonzero=self.nonzero[chosen],
                       data=self.data[chosen], log_loss=self.log_loss[chosen])

    def residuals(self, x: ndarray) -> tuple[ndarray, ndarray]:
        """log predicted - log measured, (n,), and its derivatives by x, (n, k)."""
        values = np.exp(np.clip(x, -60.0, 60.0))
        b_n, a_d, b_d, c = values[-4:]
        factor, of_factor = self.form.factor(values[:-4], self.design)
        size = self.nonzero**-b_n
        scarce = (a_d / self.data) ** b_d
        loss = factor * size + scarce + c
        slopes = np.concatenate([of_factor * size[:, None], np.stack([
            -factor * size * b_n * np.log(self.nonzero), scarce * b_d,
            scarce * b_d * np.log(a_d / self.data), np.full_like(loss, c)], axis=1)], axis=1)
        return np.log(loss) - self.log_loss, slopes / loss[:, None]

    def law(self, x: ndarray) -> Law:
        """Law of the vector x, in raw units."""
        found = dict(zip(self.names, (float(v) for v in np.exp(x)), strict=True))
        scale = self.unit_n ** found["b_n"]
        found |= {name: found[name] * scale for name in self.names[:-4]
                  if self.form.is_scale(name)}
        return Law(self.form, {**found, "a_d": found["a_d"] * self.unit_d})


def _resampling(points: Sequence[Point], random: np.random.Generator) -> Callable[[], ndarray]:
    """Draws indices of points, with replacement, those of a cell together and some of every group,
    without which nothing is known of it."""
    cells: dict[object, list[int]] = {}
    for number, point in enumerate(points):
        cells.setdefault(point.cell or number, []).append(number)
    members = [np.array(cell) for cell in cells.values()]
    groups = np.array([point.group for point in points])

    def draw() -> ndarray:
        while True:
            chosen = np.concatenate([members[i] for i in random.integers(len(members),
                                                                         size=len(members))])
            if set(groups[chosen]) == set(groups):
                return chosen
    return draw


def _minimize(data: _Data, start: ndarray) -> tuple[ndarray, float]:
    """Minimizes the Huber loss from one start: (x, loss), the loss in units of delta^2."""
    def objective(x: ndarray) -> tuple[float, ndarray]:
        residual, slopes = data.residuals(x)
        r = residual / DELTA
        inside = np.abs(r) <= 1.0
        loss = np.where(inside, 0.5 * r * r, np.abs(r) - 0.5)
        return float(loss.mean()), (np.where(inside, r, np.sign(r)) @ slopes) / DELTA / len(r)

    # Starts may run away to infinity. Those are not the best, and their warnings say nothing.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        end = minimize(objective, start, jac=True, method="BFGS",
                       options={"gtol": 1e-10, "maxiter": 5000})
    return end.x, float(end.fun) if np.isfinite(end.fun) else float("inf")


def _range(values: Sequence[float] | ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, RANGE)
    return float(low), float(high)


def _intervals(laws: list[Law]) -> dict[str, tuple[float, float]]:
    return {name: _range([law.coefficients[name] for law in laws])
            for name in laws[0].coefficients}


def _gains(law: Law, laws: list[Law], points: Sequence[Point]) -> dict[str | float, tuple]:
    with np.errstate(all="ignore"):
        resampled = [each.form.gains(each, points) for each in laws]
        return {key: (gain, *_range([each[key] for each in resampled]))
                for key, gain in law.form.gains(law, points).items()}


def _predictions(law: Law, laws: list[Law], residuals: ndarray,
                 held_out: Sequence[Point]) -> list[Prediction]:
    """Each interval is of a fit's prediction and a residual, both drawn; residuals are widened for
    the coefficients that were fitted to them."""
    if not held_out:
        return []
    spare = max(1, len(residuals) - len(law.coefficients))
    noise = residuals * np.sqrt(len(residuals) / spare)
    with np.errstate(all="ignore"):
        logs = np.log([each.predict(held_out) for each in laws])  # (samples, held out)
    spread = np.exp(logs[:, None, :] - noise[None, :, None]).reshape(-1, len(held_out))
    return [Prediction(point.name, float(value), *_range(spread[:, i]),
                       None if np.isnan(point.loss) else point.loss)
            for i, (point, value) in enumerate(zip(held_out, law.predict(held_out), strict=True))]


def _doubts(data: _Data, best: ndarray, laws: list[Law]) -> list[str]:
    """Finds directions in which coefficients can move without a change of losses, and intervals
    over a factor of two."""
    found = []
    _, slopes = data.residuals(best)
    _, values, directions = np.linalg.svd(slopes, full_matrices=False)
    if values[-1] < 1e-6 * values[0]:
        moved = [data.names[i] for i in np.flatnonzero(np.abs(directions[-1]) > 0.3)]
        found.append(f"{', '.join(moved)} can change together without a change of any predicted "
                     "loss")
    wide = [k for k, (low, high) in _intervals(laws).items() if not 0.0 < high <= 2.0 * low]
    if wide:
        found.append(f"{', '.join(wide)}: the bootstrap's 5% and 95% quantiles are more than a "
                     "factor of two apart; trust the fitted losses and gains, not these "
                     "coefficients")
    return found
