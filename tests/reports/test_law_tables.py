"""Tables of the law by hand."""

from __future__ import annotations

from types import SimpleNamespace

from test_frontiers import PLOT, row

from megatron_spdf.reports.law_tables import (
    coefficients_table,
    difference_table,
    gains_table,
    held_out_table,
    progress_table,
)
from megatron_spdf.runs.held_out import PredictionRow


def words(text: str) -> str:
    return " ".join(text.split())


def test_differences_are_of_one_size_length_and_seed():
    """-0.1 and -0.3: mean -0.2, and 12.706 x 0.1414 / sqrt(2) = 1.2706 by Student's t."""
    rows = [row("75%", "s", "5", 1e9, 3.0, 1), row("75%", "s", "5", 1e9, 3.2, 2),
            row("dense", "s", "5", 1e9, 3.1, 1), row("dense", "s", "5", 1e9, 3.5, 2),
            row("75%", "l", "10", 1e9, 2.5, 1), row("dense", "l", "10", 1e9, 2.4, 1),
            row("dense", "l", "5", 1e9, 2.9, 1)]
    said = words(difference_table(rows, PLOT, "75%", "dense"))
    assert "| size | length 5 | length 10 |" in said
    assert "| s | -0.2000 ± 1.2706 | - |" in said and "| l | - | +0.1000 |" in said
    assert "75%, less dense; on average -0.1000, 2 of 3 below 0." in said
    assert "No runs of 50% and dense" in difference_table(rows, PLOT, "50%", "dense")


def test_gains_stand_beside_the_published_ones():
    fits = [{"form": "published", "gains": {0.5: (1.4, 1.2, 1.6), 0.75: (1.9, 1.7, 2.1)}},
            {"form": "groups", "gains": {"set 0.75": (2.0, 1.8, 2.2),
                                         "static 0.75": (1.91, 1.7, 2.2)}}]
    said = words(gains_table(fits))
    assert said.index("| static 75.0% | 1.91 [1.70, 2.20] | 1.90 [1.70, 2.10] | 2.16 |") < (
        said.index("| set 75.0% | 2.00 [1.80, 2.20] | - | 2.16 |"))
    assert "| static 50.0% | - | 1.40 [1.20, 1.60] | 1.59 |" in words(gains_table(fits[:1]))


def test_held_out_losses_are_inside_or_not():
    labels = {"size": "s", "masks": "75%", "length": "5"}
    predictions = [PredictionRow(labels=labels, form=form, runs=9, predicted=3.0, low=low, high=3.1)
                   for form, low in (("groups", 2.9), ("average", 2.99))]
    predictions.append(predictions[0].model_copy(update={"labels": {**labels, "size": "l"}}))
    assert "2 held-out cells are predicted, and none has been" in held_out_table(predictions, [])
    rows = [row("75%", "s", "5", 1e9, loss, seed).model_copy(update={"held_out": True})
            for seed, loss in ((1, 2.95), (2, 3.05))]
    said = words(held_out_table(predictions, rows))
    assert "| groups | 9 | 3.000 [2.900, 3.100] | 2.950, 3.050 | 2 of 2 |" in said
    assert "by form: groups: 2 of 2; average: 1 of 2." in said and "| l |" not in said


def test_coefficients_stand_with_their_quantiles_and_their_fits_runs_and_errors():
    fits = [{"form": "average", "runs": 12, "error": 0.0123, "law": {"a_n": 2.0, "b_n": 0.2512},
             "interval": {"b_n": (0.2, 0.3), "a_n": (1.5, 2.5)}},
            {"form": "groups", "runs": 15, "error": 0.004, "law": {"c": 1.75},
             "interval": {"c": (1.25, 1.8)}}]
    said = words(coefficients_table(fits))
    assert "| form | runs | error | coefficient | value | 5% to 95% |" in said
    for line in ("| average | 12 | 1.23% | a_n | 2 | 1.5 to 2.5 |",
                 "| average | 12 | 1.23% | b_n | 0.2512 | 0.2 to 0.3 |",
                 "| groups | 15 | 0.40% | c | 1.75 | 1.25 to 1.8 |"):
        assert line in said


def test_progress_counts_runs_of_the_planned_seeds_of_every_length():
    cells = [SimpleNamespace(labels={"size": size, "masks": mask, "length": length},
                             trials={seed: None for seed in seeds})
             for mask, size, seeds in (("dense", "s", (1, 2)), ("dense", "l", (1,)),
                                       ("75%", "s", (1, 2, 3)))
             for length in ("5", "10")]
    rows = [row("dense", "s", "5", 1e9, 3.0, 2), row("dense", "s", "10", 1e9, 3.0, 1),
            row("75%", "s", "5", 1e9, 3.0, 1)]
    said = words(progress_table(cells, rows, PLOT))
    assert "| masks | s | l |" in said and "3 of 12 runs, of seed 1, 2." in said
    assert "| dense | 2 of 4 | 0 of 2 |" in said and "| 75% | 1 of 6 | 0 of 0 |" in said
