"""Scaling law of sparsely-connected foundation models.

    L(S, N, D) = (a_S (1 - S)^b_S + c_S) N^(-b_N) + (a_D / D)^b_D + c

L is the loss, S the final sparsity, N the non-zero weights of the layers (no embeddings), D the
data in tokens or images. C stands for training FLOPs.

Source: Frantar et al. 2023, arXiv:2309.08520.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar

from megatron_spdf.files import save_figure
from megatron_spdf.schedule.flops import average_sparsity, gradual_pruning
from megatron_spdf.tables import Column, Table

CAVEAT = ("CAUTION: the published fits are of models pruned gradually by magnitude (GMP) from "
          "dense ones. They do not hold for static random masks, SPDF's, which end at a higher "
          "loss: fit your own runs (tools/plan.py fit).")
Cost = Literal["dense", "gmp"]
DENSEST, SPARSEST = 0.0, 1.0 - 1e-6


@dataclass(frozen=True)
class ScalingLaw:
    """Law with its coefficients, N in weights and D in `unit`."""

    a_s: float
    b_s: float
    c_s: float
    b_n: float
    a_d: float
    b_d: float
    c: float
    unit: str = "tokens"

    def loss(self, sparsity, nonzero, data):
        """Loss of sparsity S, non-zero weights N and data D: numbers, or arrays that broadcast."""
        capacity = self.a_s * (1.0 - np.asarray(sparsity)) ** self.b_s + self.c_s
        return (capacity * np.asarray(nonzero, float) ** -self.b_n
                + (self.a_d / np.asarray(data, float)) ** self.b_d + self.c)

    def equivalent_dense(self, sparsity: float) -> float:
        """Size of the dense model with the same loss at the same data, over the sparse model's N.

        Source: the gain of equation 9 in Frantar et al. 2023.
        """
        sparse = self.a_s * (1.0 - sparsity) ** self.b_s + self.c_s
        try:
            return ((self.a_s + self.c_s) / sparse) ** (1.0 / self.b_n)
        except (OverflowError, ZeroDivisionError):  # the loss hardly depends on the size
            return math.inf

    def optimal_sparsity(self, nonzero: float, compute: float) -> float:
        """Sparsity of least loss among models of N non-zero weights trained with C FLOPs, in closed
        form.

        Training costs what the dense model of the same shape costs: D = C (1 - S) / (6 N).

        Args:
            nonzero: N.
            compute: C, in FLOPs.

        Returns:
            S in [0, 1); 0 if dense is best.
        """
        power = self.b_d + self.b_s
        logarithm = (math.log(self.b_d / (self.a_s * self.b_s)) + self.b_n * math.log(nonzero)
                     + self.b_d * math.log(6.0 * self.a_d * nonzero / compute)) / power
        return max(0.0, -math.expm1(logarithm))

    def optimal_sparsity_numeric(self, nonzero: float, compute: float,
                                 cost: Cost = "dense") -> float:
        """Sparsity of least loss by minimization, for any cost of training. 0 if dense is no
        worse."""
        multiplier = cost_multiplier(cost)

        def loss(sparsity: float) -> float:
            return float(self.loss(sparsity, nonzero,
                                   compute / (6.0 * nonzero * multiplier(sparsity))))

        found = minimize_scalar(loss, bounds=(DENSEST, SPARSEST), method="bounded",
                                options={"xatol": 1e-12})
        return float(found.x) if found.fun < loss(DENSEST) else 0.0


# Raw units; computed from the fits published with the paper.
PUBLISHED = {
    "t5": ScalingLaw(16.8, 0.722, 45.0, 0.245, 6.90e8, 0.203, 0.651),
    "vit": ScalingLaw(294.0, 0.821, 468.0, 0.392, 2.37e8, 0.890, 4.517, unit="images"),
}


def gmp_cost(sparsity: float) -> float:
    """FLOPs of training by gradual pruning, over those of the final sparse model all along.

    Source: c_mul of Frantar et al. 2023.
    """
    return (1.0 - average_sparsity(gradual_pruning(sparsity))) / (1.0 - sparsity)


def cost_multiplier(cost: Cost) -> Callable[[float], float]:
    """FLOPs per token over 6 N, as a function of the final sparsity.

    Args:
        cost: "dense", the FLOPs of the dense shape; or "gmp", those of gradual pruning.
    """
    return gmp_cost if cost == "gmp" else lambda sparsity: 1.0 / (1.0 - sparsity)


def plot_contours(law: ScalingLaw, name: str, path: Path) -> None:
    """Plots loss against sparsity at constant FLOPs, and contours of optimal sparsity over N and
    C."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=140)
    _iso_flop_curves(law, left)
    _optimal_contours(law, right)
    figure.suptitle(f"Scaling law of sparse models, {name} fit (GMP-trained models only, not "
                    "static masks)", y=0.98)
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)


def _iso_flop_curves(law: ScalingLaw, axes) -> None:
    """Plots L(S) of one size at several budgets, S from 0 to 97%, with the least loss of each
    marked."""
    nonzero, levels = 1e8, np.linspace(0.0, 0.97, 200)
    for exponent in range(18, 23):
        compute = 10.0**exponent
        curve = law.loss(levels, nonzero, compute * (1.0 - levels) / (6.0 * nonzero))
        (line,) = axes.plot(levels, curve, label=f"$10^{{{exponent}}}$ FLOPs")
        best = law.optimal_sparsity(nonzero, compute)
        axes.plot(best, law.loss(best, nonzero, compute * (1.0 - best) / (6.0 * nonzero)), "o",
                  color=line.get_color())
    axes.set(xlabel="sparsity S", ylabel="loss",
             title=f"iso-FLOP curves, N = {nonzero:.0e} non-zero weights",
             ylim=(None, axes.get_ylim()[0] + 0.8 * np.ptp(axes.get_ylim())))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _optimal_contours(law: ScalingLaw, axes) -> None:
    """Plots S_opt over (N, C): solid lines at the dense shape's FLOPs, dashed with gradual
    pruning's."""
    nonzero, compute = np.logspace(6, 10, 17), np.logspace(16, 25, 19)
    # Before the labels: their gaps are cut for the scales at the time of drawing.
    axes.set(xscale="log", yscale="log")
    optima = {"solid": law.optimal_sparsity,
              "dashed": lambda n, c: law.optimal_sparsity_numeric(n, c, "gmp")}
    for style, optimum in optima.items():
        best = np.array([[optimum(n, c) for n in nonzero] for c in compute])
        lines = axes.contour(nonzero, compute, best, levels=[0.25, 0.5, 0.75, 0.875],
                             linestyles=style, cmap="plasma", vmax=1.1)
        axes.clabel(lines, fmt=lambda level: f"{level:.1%}", fontsize=8)
    axes.set(xlabel="non-zero weights N", ylabel="training FLOPs C",
             title="optimal sparsity; dashed: at the cost of GMP")
    axes.grid(alpha=0.3)


def describe_law(law: ScalingLaw, name: str, nonzero: float, compute: float) -> dict:
    """Values of the law for a size and a budget: gains and losses at sparsities, and the best
    sparsity."""
    rows = []
    for sparsity in (0.0, 0.5, 0.75, 0.875, 0.9):
        data = compute * (1.0 - sparsity) / (6.0 * nonzero)
        rows.append({"sparsity": sparsity, "equivalent_dense": law.equivalent_dense(sparsity),
                     "gmp_cost": gmp_cost(sparsity), "data": data,
                     "loss": float(law.loss(sparsity, nonzero, data)),
                     "data_gmp": compute / (6.0 * nonzero * gmp_cost(sparsity))})
        rows[-1]["loss_gmp"] = float(law.loss(sparsity, nonzero, rows[-1]["data_gmp"]))
    return {
        "fit": name, "coefficients": asdict(law), "nonzero": nonzero, "compute": compute,
        "rows": rows,
        "optimal_sparsity": law.optimal_sparsity(nonzero, compute),
        "optimal_sparsity_gmp": law.optimal_sparsity_numeric(nonzero, compute, "gmp"),
    }


def render_law(facts: dict) -> str:
    """Formats the result of `describe_law` as text, the caution first."""
    c = facts["coefficients"]
    columns = [
        Column("sparsity", form=".1%"),
        Column("equivalent dense size", "equivalent_dense", ".2f", suffix="x"),
        Column("at the dense cost: FLOPs / 6ND", lambda r: 1 / (1 - r["sparsity"]), ".3f"),
        Column(c["unit"], "data", ".3g"), Column("loss", form=".4f"),
        Column("by gradual pruning: FLOPs / 6ND", "gmp_cost", ".3f"),
        Column(c["unit"], "data_gmp", ".3g"), Column("loss", "loss_gmp", ".4f")]
    lines = [
        CAVEAT,
        "",
        f"L(S, N, D) = ({c['a_s']:g} (1 - S)^{c['b_s']:g} + {c['c_s']:g}) N^-{c['b_n']:g} + "
        f"({c['a_d']:g} / D)^{c['b_d']:g} + {c['c']:g}     ({facts['fit']}, D in {c['unit']})",
        f"N = {facts['nonzero']:.3g} non-zero linear weights, C = {facts['compute']:.3g} training "
        "FLOPs",
        "",
        Table(columns, facts["rows"]).text(),
        "",
        f"least loss at the dense cost: S = {facts['optimal_sparsity']:.4f}; by gradual pruning: "
        f"S = {facts['optimal_sparsity_gmp']:.4f}",
    ]
    return "\n".join(lines)
