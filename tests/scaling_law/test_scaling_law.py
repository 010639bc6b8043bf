"""The law of Frantar et al. 2023 against the losses that were published with it, and its optimum
against itself."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from megatron_spdf.scaling_law.law import (
    CAVEAT,
    PUBLISHED,
    describe_law,
    gmp_cost,
    plot_contours,
    render_law,
)

DATA = Path(__file__).parent / "data"
# Linear weights at scale 1: 24 blocks of T5-Base, 12 of ViT-B, both 768 wide; T5 saw 128 sequences
# of 512 a step.
T5_WEIGHTS, VIT_WEIGHTS, T5_TOKENS_A_STEP = 24 * 12 * 768**2, 12 * 12 * 768**2, 128 * 512
GRID = [(n, c) for n in np.logspace(6, 10, 9) for c in np.logspace(17, 25, 9)]


def published_runs(name: str) -> list[dict[str, float]]:
    lines = [line for line in (DATA / name).read_text().splitlines() if not line.startswith("#")]
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def test_t5_losses_at_the_published_grid_points():
    runs, law = published_runs("t5_c4.csv"), PUBLISHED["t5"]
    assert len(runs) == 48
    for run in runs:
        nonzero = T5_WEIGHTS * run["scale"] * (1 - run["sparsity"])
        predicted = law.loss(run["sparsity"], nonzero, run["steps"] * T5_TOKENS_A_STEP)
        # the fit's own error: 1% rms, 2.8% at most
        assert predicted == pytest.approx(run["loss"], rel=0.03)


def test_vit_losses_at_the_published_grid_points():
    runs, law = published_runs("vit_jft.csv"), PUBLISHED["vit"]
    assert len(runs) > 100
    nonzero = [VIT_WEIGHTS * r["scale"] * (1 - r["sparsity"]) for r in runs]
    predicted = law.loss([r["sparsity"] for r in runs], nonzero, [r["images"] for r in runs])
    errors = np.log(predicted / np.array([r["loss"] for r in runs]))
    assert np.sqrt(np.mean(errors**2)) < 0.015
    assert np.abs(errors).max() < 0.04


@pytest.mark.parametrize(("sparsity", "gain", "cost"),
                         [(0.0, 1.0, 1.0), (0.5, 1.59, 1.375), (0.75, 2.16, 2.125),
                                                        (0.875, 2.63, 3.625)])
def test_gains_and_costs_of_the_paper(sparsity, gain, cost):
    assert PUBLISHED["t5"].equivalent_dense(sparsity) == pytest.approx(gain, abs=0.005)
    assert gmp_cost(sparsity) == pytest.approx(cost, abs=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_equivalent_dense_model_has_the_same_loss(name):
    law = PUBLISHED[name]
    for sparsity in (0.3, 0.75, 0.95):
        assert law.loss(0.0, 1e8 * law.equivalent_dense(sparsity),
                        1e10) == pytest.approx(law.loss(sparsity, 1e8, 1e10))


@pytest.mark.parametrize("name", PUBLISHED)
def test_optimal_sparsity_is_the_minimum(name):
    law, zeros, inside = PUBLISHED[name], 0, 0
    for nonzero, compute in GRID:
        closed, numeric = (
            law.optimal_sparsity(nonzero, compute),
            law.optimal_sparsity_numeric(nonzero, compute),
        )
        assert closed == pytest.approx(numeric, abs=1e-6)
        zeros, inside = zeros + (closed == 0.0), inside + (0.0 < closed < 1.0)
    assert zeros > 5 and inside > 20


def test_cheaper_sparse_training_moves_the_optimum_up():
    law = PUBLISHED["t5"]
    for nonzero, compute in ((1e7, 1e19), (1e8, 1e21), (1e9, 1e23)):
        dense, gmp = (law.optimal_sparsity_numeric(nonzero, compute, cost)
                      for cost in ("dense", "gmp"))
        assert 0.0 < dense < gmp < 1.0
        around = [law.loss(s, nonzero, compute / (6 * nonzero * gmp_cost(s)))
                  for s in (gmp - 1e-3, gmp, gmp + 1e-3)]
        assert around[1] < min(around[0], around[2])


def test_contours_are_drawn(tmp_path):
    plot_contours(PUBLISHED["vit"], "vit", tmp_path / "law.png")
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "law.png"
    ).stat().st_size > 30_000


def test_the_caution_comes_first():
    text = render_law(describe_law(PUBLISHED["t5"], "t5", 1e8, 1e21))
    assert text.startswith(CAVEAT) and "static random masks" in CAVEAT
    assert "S = 0.71" in text and "2.16x" in text
