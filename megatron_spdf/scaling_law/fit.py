"""Fits the scaling law to a user's own runs: Huber loss on log losses, BFGS from many starts, and
bootstrap.

Symbols as in law.py. Shapes: n runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray
from scipy.optimize import minimize

from megatron_spdf.scaling_law.law import ScalingLaw
from megatron_spdf.tables import Column, Table

COEFFICIENTS = ("a_s", "b_s", "c_s", "b_n", "a_d", "b_d", "c")
DELTA = 1e-3  # of the Huber loss on log losses, the paper's for T5
LEVELS = 3  # different values of S, of N and of D that three coefficients each need


@dataclass(frozen=True)
class Point:
    """Finished training: final sparsity, non-zero linear weights, tokens, loss in nats."""

    sparsity: float
    nonzero: float
    data: float
    loss: float
    name: str = ""


@dataclass(frozen=True)
class Fit:
    """Fitted law and its uncertainty.

    Attributes:
        law: with the fitted coefficients.
        error: root mean square of log(predicted / measured).
        interval: coefficient -> 5% and 95% quantile over bootstrap samples.
        gains: sparsity -> equivalent dense size, with its quantiles; the data may determine these
            even where they do not determine the coefficients.
        doubts: reasons not to trust a coefficient, as sentences.
    """

    law: ScalingLaw
    error: float
    interval: dict[str, tuple[float, float]]
    gains: dict[float, tuple[float, float, float]]
    doubts: list[str]


def shortcomings(points: Sequence[Point]) -> list[str]:
    """Lists reasons why points cannot determine the seven coefficients. Empty if they may."""
    found = []
    if len(points) < len(COEFFICIENTS):
        found.append(f"{len(points)} run{'s' * (len(points) != 1)} for {len(COEFFICIENTS)} "
                     f"coefficients; at least {len(COEFFICIENTS)} are needed, and the published "
                     "fit had 48")
    for what, values in (("sparsities", {round(p.sparsity, 4) for p in points}),
                         ("numbers of non-zero weights", {p.nonzero for p in points}),
                         ("amounts of data", {p.data for p in points})):
        if len(values) < LEVELS:
            found.append(f"{len(values)} different {what}; at least {LEVELS} are needed to tell "
                         "scale, exponent and offset apart")
    return found


def fit_law(points: Sequence[Point], starts: int = 32, samples: int = 100, seed: int = 0) -> Fit:
    """Fits the law.

    Args:
        points: finished runs.
        starts: number of random starting points; the best end counts.
        samples: bootstrap resamplings of the points, each fitted from the best end.
        seed: of starting points and resamplings.

    Raises:
        ValueError: the points cannot determine the coefficients, are no positive numbers, or no
            start leads to a fit.
    """
    for point in points:
        values = (point.nonzero, point.data, point.loss)
        if not (all(math.isfinite(v) and v > 0.0 for v in values) and 0.0 <= point.sparsity < 1.0):
            raise ValueError(f"the run {point.name} has sparsity {point.sparsity:g}, "
                             f"{point.nonzero:g} non-zero weights, {point.data:g} tokens and loss "
                             f"{point.loss:g}; a law is of positive numbers, leave it out")
    missing = shortcomings(points)
    if missing:
        raise ValueError("the law is under-determined by these runs: " + "; ".join(missing))
    random = np.random.default_rng(seed)
    data = _Data.of(points)
    ends = [_minimize(data, start)
            for start in random.uniform(-2.0, 1.0, size=(starts, len(COEFFICIENTS)))]
    best, least = min(ends, key=lambda end: end[1])
    if not np.isfinite(least):
        raise ValueError(f"no fit: the minimization failed from all {starts} starting points; "
                         "check the losses of the runs, or raise --starts")
    laws = []
    for _ in range(samples):
        chosen = random.integers(len(points), size=len(points))
        laws.append(data.law(_minimize(data.take(chosen), best)[0]))
    law = data.law(best)
    return Fit(law, float(np.sqrt(np.mean(data.residuals(best)[0] ** 2))), _intervals(laws),
               _gains(law, laws, points), _doubts(data, best, laws))


@dataclass(frozen=True)
class _Data:
    """Points in units of their geometric means, so that all coefficients are of the order of one.

    The vector x is log a_S, log b_S, log c_S, log b_N, log a_D, log b_D, log c in these units. The
    logarithm keeps all of them positive.
    """

    density: ndarray
    nonzero: ndarray
    data: ndarray
    log_loss: ndarray
    unit_n: float
    unit_d: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Data:
        """Scales points to their geometric means."""
        s, n, d, loss = (np.array([getattr(p, k) for p in points], float)
                         for k in ("sparsity", "nonzero", "data", "loss"))
        unit_n, unit_d = (float(np.exp(np.mean(np.log(v)))) for v in (n, d))
        return cls(1.0 - s, n / unit_n, d / unit_d, np.log(loss), unit_n, unit_d)

    def take(self, chosen: ndarray) -> _Data:
        """Resamples the points by index."""
        return _Data(self.density[chosen], self.nonzero[chosen], self.data[chosen],
                     self.log_loss[chosen], self.unit_n, self.unit_d)

    def residuals(self, x: ndarray) -> tuple[ndarray, ndarray]:
        """log predicted - log measured, (n,), and its derivatives by x, (n, 7)."""
        a_s, b_s, c_s, b_n, a_d, b_d, c = np.exp(np.clip(x, -60.0, 60.0))
        pruned = a_s * self.density**b_s
        size = self.nonzero**-b_n
        scarce = (a_d / self.data) ** b_d
        loss = (pruned + c_s) * size + scarce + c
        slopes = np.stack([
            pruned * size, pruned * size * b_s * np.log(self.density), c_s * size,
            -(pruned + c_s) * size * b_n * np.log(self.nonzero), scarce * b_d,
            scarce * b_d * np.log(a_d / self.data), np.full_like(loss, c)], axis=1)
        return np.log(loss) - self.log_loss, slopes / loss[:, None]

    def law(self, x: ndarray) -> ScalingLaw:
        """Law of the vector x, in raw units."""
        a_s, b_s, c_s, b_n, a_d, b_d, c = (float(v) for v in np.exp(x))
        scale = self.unit_n**b_n
        return ScalingLaw(a_s * scale, b_s, c_s * scale, b_n, a_d * self.unit_d, b_d, c)


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


def _intervals(laws: list[ScalingLaw]) -> dict[str, tuple[float, float]]:
    return {k: tuple(float(q) for q in np.quantile([getattr(law, k) for law in laws], (0.05, 0.95)))
            for k in COEFFICIENTS}


def _gains(law: ScalingLaw, laws: list[ScalingLaw], points: Sequence[Point]) -> dict[float, tuple]:
    levels = sorted({round(p.sparsity, 4) for p in points} - {0.0})
    with np.errstate(all="ignore"):
        return {s: (law.equivalent_dense(s), *(float(q) for q in np.quantile(
            [each.equivalent_dense(s) for each in laws], (0.05, 0.95)))) for s in levels}


def _doubts(data: _Data, best: ndarray, laws: list[ScalingLaw]) -> list[str]:
    """Finds directions in which coefficients can move without a change of losses, and intervals
    over a factor of two."""
    found = []
    _, slopes = data.residuals(best)
    _, values, directions = np.linalg.svd(slopes, full_matrices=False)
    if values[-1] < 1e-6 * values[0]:
        moved = [COEFFICIENTS[i] for i in np.flatnonzero(np.abs(directions[-1]) > 0.3)]
        found.append(f"{', '.join(moved)} can change together without a change of any predicted "
                     "loss")
    wide = [k for k, (low, high) in _intervals(laws).items() if not 0.0 < high <= 2.0 * low]
    if wide:
        found.append(f"{', '.join(wide)}: the bootstrap's 5% and 95% quantiles are more than a "
                     "factor of two apart; trust the fitted losses and gains, not these "
                     "coefficients")
    return found


def render_points(points: Sequence[Point]) -> str:
    """Formats the runs as the law sees them."""
    return Table([Column("run", "name"), Column("sparsity", form=".2%"),
                  Column("non-zero weights", "nonzero", ",.0f"), Column("tokens", "data", ".4g"),
                  Column("loss", form=".4f")], points).text("  ")


def render_fit(fit: Fit) -> str:
    """Formats coefficients and gains with their bootstrap quantiles, and the doubts about them."""
    lines = [f"fitted, root mean square error of log losses {fit.error:.2e}; in brackets 5% and "
             "95% of bootstrap:"]
    lines += [f"  {k:<4} = {getattr(fit.law, k):<12.5g} [{low:.4g}, {high:.4g}]"
              for k, (low, high) in fit.interval.items()]
    lines += [f"  a model of sparsity {s:.1%} equals a dense one of {gain:.3f}x its non-zero "
              f"weights [{low:.3f}, {high:.3f}]" for s, (gain, low, high) in fit.gains.items()]
    lines += [f"  DOUBT: {doubt}" for doubt in fit.doubts]
    lines.append("It holds for the way these runs were made sparse, and inside the range of their "
                 "sizes and lengths.")
    return "\n".join(lines)
