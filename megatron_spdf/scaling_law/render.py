"""Fitted laws as text."""

from __future__ import annotations

from megatron_spdf.scaling_law.fit import Fit
from megatron_spdf.scaling_law.law import PUBLISHED
from megatron_spdf.tables import Column, Table

GMP = PUBLISHED["t5"]


def render_fit(fit: Fit) -> str:
    """Formats coefficients and gains with their bootstrap quantiles, the doubts about them, and
    predictions beside what was measured."""
    lines = [fit.law.form.title,
             f"fitted, root mean square error of log losses {fit.error:.2e}; in brackets 5% and "
             "95% of bootstrap:"]
    width = max(map(len, fit.interval))
    lines += [f"  {k:<{width}} = {fit.law.coefficients[k]:<12.5g} [{low:.4g}, {high:.4g}]"
              for k, (low, high) in fit.interval.items()]
    lines += [_render_gain(key, *gain) for key, gain in fit.gains.items()]
    lines += [f"  DOUBT: {doubt}" for doubt in fit.doubts]
    if fit.predictions:
        lines.append(_render_predictions(fit))
    lines.append("It holds for the way these runs were made sparse, and inside the range of their "
                 "sizes and lengths.")
    return "\n".join(lines)


def _render_gain(key: str | float, gain: float, low: float, high: float) -> str:
    """Equivalent dense size, beside that of the published fit, which is of GMP and T5."""
    what = f"sparsity {key:.1%}" if isinstance(key, float) else f"{key}"
    sparsity = key if isinstance(key, float) else float(key.split()[-1])
    return (f"  a model of {what} equals a dense one of {gain:.3f}x its non-zero "
            f"weights [{low:.3f}, {high:.3f}]; published, of GMP: "
            f"{GMP.equivalent_dense(sparsity):.2f}x")


def _render_predictions(fit: Fit) -> str:
    columns = [Column("held out", "name"), Column("predicted", form=".4f"),
               Column("5%", "low", ".4f"), Column("95%", "high", ".4f"),
               Column("measured", form=".4f"),
               Column("", lambda row: {None: None, True: "inside", False: "OUTSIDE"}[row.inside])]
    known = [each.inside for each in fit.predictions if each.inside is not None]
    return (f"{Table(columns, fit.predictions).text('  ')}\n  {sum(known)} of "
            f"{len(known)} measured losses are inside; of intervals from 5% to 95%, 9 "
            "in 10 should be")
