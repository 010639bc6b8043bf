"""Forms of the law, which share all but the factor K and what counts as size N:

    L = K N^(-b_N) + (a_D / D)^b_D + c

    published   K = a_S (1 - S)^b_S + c_S, N the weights that are not zero at the end
                (Frantar et al. 2023, arXiv:2309.08520)
    average     K = a_N, N the average over training of the weights that are not zero: what counts
                of sparsity is nothing else (Jin et al. 2025, arXiv:2501.12486)
    groups      a K for each algorithm and sparsity, N as in `published`: no form over sparsity is
                assumed, and any algorithms are compared

Shapes: n runs, k coefficients of K.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from megatron_spdf.scaling_law.law import ScalingLaw
from megatron_spdf.scaling_law.points import DENSE, Point

SHARED = ("b_n", "a_d", "b_d", "c")  # coefficients of every form, after those of K
LEVELS = 3  # different values of a quantity that scale, exponent and offset each need


class Form(ABC):
    """A form of the law."""

    name: str
    title: str

    @abstractmethod
    def of_factor(self, points: Sequence[Point]) -> tuple[str, ...]:
        """Names of the coefficients of K."""

    @abstractmethod
    def size(self, point: Point) -> float:
        """N of a run."""

    @abstractmethod
    def design(self, points: Sequence[Point], names: Sequence[str]) -> ndarray:
        """What K depends on, (n, any)."""

    @abstractmethod
    def factor(self, values: ndarray, design: ndarray) -> tuple[ndarray, ndarray]:
        """K of every run, (n,), and its derivatives by the logarithms of its coefficients, (n, k).

        Args:
            values: of the coefficients, (k,).
            design: see there.
        """

    def is_scale(self, name: str) -> bool:
        """True if a coefficient of K goes with the unit of N^b_N."""
        return True

    def levels(self, points: Sequence[Point]) -> dict[str, set]:
        """Quantities of which a fit needs several values -> values in the runs."""
        return {"numbers of non-zero weights": {self.size(p) for p in points},
                "amounts of data": {p.data for p in points}}

    def gains(self, law: Law, points: Sequence[Point]) -> dict[str | float, float]:
        """Sparsity or group -> size of the dense model with the same loss at the same data, over
        the non-zero weights."""
        return {}


@dataclass(frozen=True)
class Law:
    """A form with its coefficients, in raw units: N in weights, D in tokens."""

    form: Form
    coefficients: Mapping[str, float]

    def predict(self, points: Sequence[Point]) -> ndarray:
        """Losses in nats, (n,)."""
        names = [name for name in self.coefficients if name not in SHARED]
        values = np.array([self.coefficients[name] for name in names])
        b_n, a_d, b_d, c = (self.coefficients[name] for name in SHARED)
        factor, _ = self.form.factor(values, self.form.design(points, names))
        size = np.array([self.form.size(p) for p in points], float)
        data = np.array([p.data for p in points], float)
        return factor * size**-b_n + (a_d / data) ** b_d + c

    @property
    def published(self) -> ScalingLaw:
        """As the law of the paper, of the form `published`."""
        return ScalingLaw(**self.coefficients)


class Published(Form):
    """Form of the paper."""

    name = "published"
    title = "L = (a_S (1 - S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c, N active at the end"

    def of_factor(self, points: Sequence[Point]) -> tuple[str, ...]:
        return ("a_s", "b_s", "c_s")

    def size(self, point: Point) -> float:
        return point.nonzero

    def design(self, points: Sequence[Point], names: Sequence[str]) -> ndarray:
        return 1.0 - np.array([[p.sparsity] for p in points], float)

    def factor(self, values: ndarray, design: ndarray) -> tuple[ndarray, ndarray]:
        a_s, b_s, c_s = values
        density = design[:, 0]
        pruned = a_s * density**b_s
        return pruned + c_s, np.stack([pruned, pruned * b_s * np.log(density),
                                       np.full_like(density, c_s)], axis=1)

    def is_scale(self, name: str) -> bool:
        return name != "b_s"

    def levels(self, points: Sequence[Point]) -> dict[str, set]:
        return {"sparsities": {round(p.sparsity, 4) for p in points}, **super().levels(points)}

    def gains(self, law: Law, points: Sequence[Point]) -> dict[str | float, float]:
        return {s: law.published.equivalent_dense(s)
                for s in sorted({round(p.sparsity, 4) for p in points} - {0.0})}


class Average(Form):
    """Chinchilla's form of the average number of weights."""

    name = "average"
    title = "L = a_N N^-b_N + (a_D / D)^b_D + c, N active on average over training"

    def of_factor(self, points: Sequence[Point]) -> tuple[str, ...]:
        return ("a_n",)

    def size(self, point: Point) -> float:
        return point.mean_nonzero

    def design(self, points: Sequence[Point], names: Sequence[str]) -> ndarray:
        return np.ones((len(points), 1))

    def factor(self, values: ndarray, design: ndarray) -> tuple[ndarray, ndarray]:
        return values[0] * design[:, 0], values * design


class Groups(Form):
    """A factor for each algorithm and sparsity."""

    name = "groups"
    title = "L = K N^-b_N + (a_D / D)^b_D + c, a K for each algorithm and sparsity"

    def of_factor(self, points: Sequence[Point]) -> tuple[str, ...]:
        groups = sorted({p.group for p in points}, key=lambda group: (group != DENSE, group))
        return tuple(f"k({group})" for group in groups)

    def size(self, point: Point) -> float:
        return point.nonzero

    def design(self, points: Sequence[Point], names: Sequence[str]) -> ndarray:
        return np.array([[f"k({p.group})" == name for name in names] for p in points], float)

    def factor(self, values: ndarray, design: ndarray) -> tuple[ndarray, ndarray]:
        return design @ values, design * values

    def gains(self, law: Law, points: Sequence[Point]) -> dict[str | float, float]:
        dense, b_n = law.coefficients.get(f"k({DENSE})"), law.coefficients["b_n"]
        if dense is None:
            return {}
        return {name[2:-1]: (dense / value) ** (1.0 / b_n)
                for name, value in law.coefficients.items()
                if name.startswith("k(") and name != f"k({DENSE})"}


FORMS: dict[str, Form] = {form.name: form for form in (Published(), Average(), Groups())}
