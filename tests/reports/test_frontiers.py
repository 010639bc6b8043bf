"""Frontiers of losses over FLOPs by hand: means over seeds, and what nothing cheaper beats."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from megatron_spdf.reports import frontiers
from megatron_spdf.reports.frontiers import Spot, frontier, plot_frontiers, spots_of
from megatron_spdf.runs.experiment import Plot
from megatron_spdf.runs.loss_table import LossRow

PLOT = Plot(x="length", lines="masks", panels=["size"], frontiers=["dense", "75%"])


def row(masks: str, size: str, length: str, flops: float, loss: float, seed: int = 1) -> LossRow:
    return LossRow(labels={"size": size, "masks": masks, "length": length}, seed=seed, flops=flops,
                   algorithm="dense" if masks == "dense" else "static", sparsity=0.5, weights=9,
                   active_weights=9, average_weights=9, tokens=9, cell="", loss=loss,
                   standard_error=None, held_out=False)


def test_seeds_are_one_spot_and_other_lines_are_left_out():
    rows = [row("75%", "small", "2", 4e9, 3.0), row("75%", "small", "1", 2e9, 3.2, 1),
            row("75%", "small", "1", 2e9, 3.4, 2), row("50%", "small", "1", 1e9, 2.0)]
    first, second = spots_of(rows, PLOT)
    assert (first.line, first.algorithm, first.curve, first.flops) == ("75%", "static", "small",
                                                                       2e9)
    # Student's t at 97.5% and one degree of freedom is 12.706: 12.706 x 0.1414 / sqrt(2).
    assert first.loss == pytest.approx(3.3) and first.interval == pytest.approx(1.2706, abs=1e-3)
    assert (second.loss, second.interval) == (3.0, None)


def test_the_frontier_is_the_least_loss_of_any_model_and_never_rises():
    """Small model: 4.0 at 1 and 3.0 at 100. Large one: 4.5 at 10 and 2.5 at 1000, which crosses 3.0
    at 10 x 100^0.75 = 316; a third ends above what is cheaper."""
    def spot(curve: str, flops: float, loss: float) -> Spot:
        return Spot("75%", "static", curve, flops, loss, None)

    spots = [spot("large", 10, 4.5), spot("small", 100, 3.0), spot("small", 1, 4.0),
             spot("large", 1000, 2.5), spot("poor", 50, 3.9)]
    flops, losses = frontier(spots)
    assert flops[0] == pytest.approx(1) and flops[-1] == pytest.approx(1000)
    for at, loss in ((1, 4.0), (10, 3.5), (50, 4 - np.log10(50) / 2), (100, 3.0), (300, 3.0),
                     (10 * 100**0.875, 2.75), (1000, 2.5)):
        assert np.interp(at, flops, losses) == pytest.approx(loss, abs=0.01)
    assert (np.diff(losses) <= 0).all()
    assert set(frontier([spot("worse", 1, 2.0), spot("worse", 9, 2.5)])[1]) == {2.0}
    assert frontier([spot("one", 3.0, 2.0)])[1].tolist() == [2.0] * len(flops)


def test_a_table_without_a_line_is_drawn(tmp_path):
    for rows in ([], [row("75%", "small", "1", 2e9, 3.2)]):
        plot_frontiers(rows, PLOT, tmp_path / "picture.png")
        plot_frontiers(rows, PLOT, tmp_path / "dark.png", dark=True)
        assert (tmp_path / "dark.png").read_bytes() != (tmp_path / "picture.png").read_bytes()


def test_spots_curves_and_frontiers_are_drawn_as_they_are(monkeypatch, tmp_path):
    """A thin curve for each size, every spot with its interval, and the frontier over them."""
    figures = []
    monkeypatch.setattr(frontiers, "save_figure", lambda figure, path: figures.append(
        (figure, path)))
    rows = [row("75%", "s", "1", 1e9, 3.2, 1), row("75%", "s", "1", 1e9, 3.4, 2),
            row("75%", "s", "2", 2e9, 3.0), row("75%", "l", "1", 4e9, 2.5),
            row("dense", "s", "1", 3e9, 2.75), row("50%", "s", "1", 1e9, 9.0)]
    plot_frontiers(rows, PLOT, tmp_path / "f.png")
    ((figure, path),) = figures
    (axes,) = figure.axes
    assert path == tmp_path / "f.png" and axes.get_xscale() == "log"
    assert axes.get_xlabel() == "training FLOPs" and "nats per token" in axes.get_ylabel()
    thin = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
            if line.get_linewidth() == 0.9]
    assert thin == [([3e9], [2.75]), ([1e9, 2e9], [pytest.approx(3.3), 3.0]), ([4e9], [2.5])]
    spots = spots_of(rows, PLOT)
    for bars, line in zip(axes.containers, ("dense", "75%"), strict=True):
        own = [spot for spot in spots if spot.line == line]
        assert list(bars[0].get_xdata()) == [spot.flops for spot in own]
        assert list(bars[0].get_ydata()) == [spot.loss for spot in own]
        assert [(top - low) / 2 for (_, low), (_, top) in bars[2][0].get_segments()] == (
            pytest.approx([spot.interval or 0.0 for spot in own]))
    thick = [line for line in axes.lines if line.get_linewidth() == 2.2]
    assert [line.get_label() for line in thick] == ["dense", "75% (static)"]
    assert len({to_hex(line.get_color()) for line in axes.lines}) == 2
    for line, name in zip(thick, ("dense", "75%"), strict=True):
        flops, losses = frontier([spot for spot in spots if spot.line == name])
        assert list(line.get_xdata()) == list(flops) and list(line.get_ydata()) == list(losses)
