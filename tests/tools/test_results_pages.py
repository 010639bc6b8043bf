"""Pages of docs/results say what the tables beside them say: figures are rendered again from the
tables and compared with the pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megatron_spdf.records.json_reader import read_json
from megatron_spdf.reports.score_table import read_scores, render_scores
from megatron_spdf.runs.experiment import cells, load_experiment, summary
from megatron_spdf.runs.held_out import labels_of, of_form, read_predictions
from megatron_spdf.runs.loss_table import LossRow, read_table
from megatron_spdf.scaling_law.fit import fit_law
from megatron_spdf.scaling_law.forms import FORMS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
TUNED = ("optimizer.lr", "optimizer.embedding_lr", "model.init_std")
sys.path.insert(0, str(ROOT / "tools"))
import law_page  # noqa: E402


def between(page: str, name: str) -> str:
    """What a tool wrote on a page, without the line on date, device and versions."""
    text = (RESULTS / page).read_text()
    own = text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->\n")[0]
    assert own, f"{page} has no {name}"
    return own.split("\n", 3)[3].strip()


def lines_of(page: str, name: str) -> list[list[str]]:
    """Cells of the tables there."""
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in between(page, name).splitlines() if line.startswith("|")]


CELL = ("size", "budget", "masks")


def test_means_of_moving_masks_are_those_of_its_table():
    losses: dict[tuple, dict[int, float]] = {}
    for row in read_table(RESULTS / "moving_masks.csv"):
        losses.setdefault(tuple(row.labels[axis] for axis in CELL), {})[row.seed] = row.loss
    shown = {tuple(line[:3]): line[8:10] for line in lines_of("moving_masks.md", "fair_comparison")
             if len(line) == 11 and line[0].endswith("M")}
    assert shown.keys() == losses.keys() and len(shown) >= 7
    for (size, budget, masks), (loss, difference) in shown.items():
        own, dense = losses[size, budget, masks], losses[size, "tokens", "dense"]
        assert loss == "{:.4f} ± {:.4f}".format(*summary([*own.values()])) and len(own) == 3
        apart = summary([own[seed] - dense[seed] for seed in own])
        assert difference == ("-" if masks == "dense" else "{:+.4f} ± {:.4f}".format(*apart))


def test_no_rate_or_spread_beside_a_chosen_one_is_better():
    """Of every cell, dense included: from the losses of all runs that were tried."""
    tried = {key_of(row.labels): row.loss for row in read_table(RESULTS / "moving_masks_tried.csv")
             if row.seed == 1}
    chosen = [row for row in read_table(RESULTS / "moving_masks.csv") if row.seed == 1]
    lines = lines_of("moving_masks.md", "fair_comparison")
    shown = {tuple(line[:4]): line[4:8] for line in lines
             if len(line) == 9 and line[0].endswith("M")}
    assert len(shown) == len(TUNED) * len(chosen) >= 21
    for row in chosen:
        for key in TUNED:
            value = float(row.labels[key])
            below, there, above = (tried[key_of({**row.labels, key: str(value * factor)})]
                                   for factor in (0.5, 1.0, 2.0))
            assert there == row.loss and below > there < above
            assert shown[(*(row.labels[axis] for axis in CELL), key)] == [
                row.labels[key], *(f"{loss:.4f}" for loss in (below, there, above))]


def key_of(labels: dict[str, str]) -> tuple:
    """Labels with their numbers as numbers."""
    return tuple((name, round(float(value), 9) if name in TUNED else value)
                 for name, value in sorted(labels.items()))


@pytest.fixture(scope="module")
def law() -> tuple:
    """The grid, its cells, the published table, its predictions and its fits."""
    path = ROOT / "configs/experiments/scaling_law.yaml"
    experiment = load_experiment(path)
    return (experiment, cells(experiment, path, []), read_table(RESULTS / "scaling_law.csv"),
            read_predictions(RESULTS / "scaling_law_predictions.csv"),
            read_json(RESULTS / "scaling_law_fit.json", list[dict]))


def test_the_tables_of_the_law_are_those_of_its_losses(law):
    assert between("README.md", "scaling_law") == law_page.render(*law).strip()


def test_the_law_is_that_of_the_losses(law):
    """Fitted again, from fewer starts."""
    _, _, rows, _, fits = law
    points = [row.point for row in rows if not row.held_out]
    assert fits
    for fit in fits:
        own = of_form(points, fit["form"])
        again = fit_law(own, starts=8, samples=1, form=FORMS[fit["form"]])
        assert len(own) == fit["runs"]
        assert again.error == pytest.approx(fit["error"], rel=1e-2)
        for key, (gain, *_) in again.gains.items():
            assert gain == pytest.approx(fit["gains"][str(key)][0], rel=2e-2)


def test_what_is_held_out_was_predicted(law):
    experiment, grid, rows, predictions, _ = law
    held = {tuple(sorted(cell.labels.items())) for cell in grid
            if any(labels.items() <= cell.labels.items() for labels in experiment.hold_out)}
    predicted = {labels_of(row) for row in predictions}
    looked_at = {labels_of(row) for row in rows if row.held_out}
    assert looked_at <= predicted <= held
    assert all(row.held_out == (labels_of(row) in held) for row in rows)


def test_the_scores_of_e2e_are_those_of_its_table():
    rows = read_scores(RESULTS / "e2e_ordering.csv")
    tuning = load_experiment(ROOT / "configs/experiments/e2e_ordering.yaml").finetune
    assert len({(*row.labels.values(), row.seed) for row in rows}) == len(rows) == 15
    assert between("e2e_ordering.md", "scores of e2e_ordering") == render_scores(
        rows, tuning.order).strip()


@pytest.mark.parametrize("name", ["moving_masks.csv", "moving_masks_tried.csv", "scaling_law.csv"])
def test_a_table_is_of_finished_runs_of_its_grid(name):
    rows = read_table(RESULTS / name)
    assert rows and len({(labels_of(row), row.seed) for row in rows}) == len(rows)
    assert all(isinstance(row, LossRow) and row.loss < 6.0 for row in rows)


def test_links_of_the_pages_lead_somewhere():
    for page in RESULTS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_and_figure_is_on_the_front_page():
    front = (RESULTS / "README.md").read_text()
    pages = "".join(page.read_text() for page in RESULTS.glob("*.md"))
    for path in RESULTS.iterdir():
        assert path.name == "README.md" or path.name in (
            front if path.suffix == ".md" else pages), path.name
