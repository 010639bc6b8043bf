"""Frontiers of losses over FLOPs by hand: means over seeds, and what nothing cheaper beats."""

from __future__ import annotations

import pytest

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


def test_the_frontier_is_what_nothing_cheaper_beats():
    def spot(flops: float, loss: float) -> Spot:
        return Spot("75%", "static", "any", flops, loss, None)

    best = [spot(1.0, 4.0), spot(2.0, 3.5), spot(5.0, 3.0)]
    beaten = [spot(2.0, 3.6), spot(3.0, 3.5), spot(4.0, 3.7)]
    assert frontier([*beaten, *reversed(best)]) == best
    assert frontier([]) == []


def test_a_table_without_a_line_is_drawn(tmp_path):
    for rows in ([], [row("75%", "small", "1", 2e9, 3.2)]):
        plot_frontiers(rows, PLOT, tmp_path / "picture.png")
        plot_frontiers(rows, PLOT, tmp_path / "dark.png", dark=True)
        assert (tmp_path / "dark.png").read_bytes() != (tmp_path / "picture.png").read_bytes()
