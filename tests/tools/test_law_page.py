"""Held-out cells are predicted without a look at their losses, stay as predicted once published,
and the page has nothing that was not predicted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_spdf.runs.experiment import cells, load_experiment
from megatron_spdf.runs.held_out import read_predictions
from megatron_spdf.runs.loss_table import LossRow, read_table, write_table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import law_page  # noqa: E402

GRID = {
    "recipe": "recipe.yaml", "output": "out", "seeds": [1],
    "axes": {"size": {str(width): {"model.hidden": width} for width in (16, 32, 64)},
             "masks": {"dense": {"sparsity.level": 0}, "75%": {"sparsity.level": 0.75},
                       "50%": {"sparsity.level": 0.5}},
             "tokens_per_weight": [10, 20, 40]},
    "hold_out": [{"size": "32", "masks": "75%"}, {"size": "64", "masks": "75%"}],
    "plot": {"x": "tokens_per_weight", "lines": "masks", "panels": ["size"],
             "frontiers": ["dense", "75%"]}}
RECIPE = {"output": "run", "model": {"layers": 2, "hidden": 32, "heads": 2, "vocab_size": 300,
                                     "max_positions": 32},
          "train": {"tokens": 256, "global_batch": 8, "micro_batch": 8, "precision": "fp32"},
          "optimizer": {"lr": 1e-3}}


@pytest.fixture
def place(tmp_path):
    """A grid with losses that follow a law, a page, and the commands of the tool."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    path = tmp_path / "law.yaml"
    path.write_text(yaml.safe_dump(GRID, sort_keys=False))
    (tmp_path / "README.md").write_text("# Law\n\n<!-- law -->\n<!-- end of law -->\n\nAfter.\n")
    random, rows = np.random.default_rng(0), []
    for cell in cells(load_experiment(path), path, []):
        recipe = cell.recipes[1]
        level, tokens = recipe.sparsity.level, float(recipe.train.tokens)
        active = 24 * recipe.model.hidden**2 * (1 - level)
        factor = 12 * (1 - level) ** 0.8 + 20
        loss = factor * active**-0.3 + (4e4 / tokens) ** 0.5 + 1.5
        rows.append(LossRow(
            labels=cell.labels, algorithm="static" if level else "dense", sparsity=level, seed=1,
            weights=active / (1 - level), active_weights=active, average_weights=active,
            tokens=tokens, flops=6 * active * tokens, cell=f"{recipe.model.hidden} {level}",
            loss=loss * np.exp(0.002 * random.standard_normal()), standard_error=None,
            held_out=level == 0.75 and recipe.model.hidden > 16))

    def run(command: str, own=None) -> str:
        words = [command, str(path), *([str(tmp_path / "losses.csv")] if own else []),
                 "--into", str(tmp_path), "--starts", "3", "--bootstrap", "8"]
        if own:
            write_table(tmp_path / "losses.csv", own)
        assert law_page.main(words) == 0
        return (tmp_path / ("law_predictions.csv" if command == "predict"
                            else "README.md")).read_text()
    return rows, run, tmp_path


@pytest.mark.slow
def test_a_held_out_loss_is_not_looked_at(place):
    rows, run, tmp_path = place
    seen = run("predict", rows)
    other = [row.model_copy(update={"loss": 9.0}) if row.held_out else row for row in rows]
    assert run("predict", other) == run("predict", [r for r in rows if not r.held_out]) == seen
    predictions = read_predictions(tmp_path / "law_predictions.csv")
    # a factor for each group knows 75% from the smallest size
    assert {(row.form, row.runs) for row in predictions} == {("published", 21), ("average", 21),
                                                             ("groups", 21)}
    assert len(predictions) == 3 * 6 and all(r.low < r.predicted < r.high for r in predictions)


@pytest.mark.slow
def test_a_prediction_stays_once_its_cell_is_published(place, capsys):
    rows, run, tmp_path = place
    held = [row for row in rows if row.held_out]
    first = [row for row in rows if not row.held_out]
    before = run("predict", first[:-1])
    text = run("page", [*first[:-1], held[0]])
    assert "| 32" in text and "published: 1 of 1" in text and text.endswith("\n\nAfter.\n")
    after = run("predict", rows)
    mine = ",".join(held[0].labels.values()) + ","
    kept = [line for line in before.splitlines() if line.startswith(mine)]
    assert len(kept) == 3
    assert [line for line in after.splitlines() if line.startswith(mine)] == kept
    assert len(set(before.splitlines()) & set(after.splitlines())) == 1 + len(kept)  # the head


def test_what_was_not_predicted_is_not_published(place, capsys):
    rows, run, tmp_path = place
    text = run("page", rows)
    assert "held out and not predicted, and is left out" in capsys.readouterr().err
    assert not any(row.held_out for row in read_table(tmp_path / "law.csv"))
    assert "21 of 27 runs, of seed 1." in text
    assert run("page").split("Reported")[1].split("\n", 1)[1] == text.split("Reported")[1].split(
        "\n", 1)[1]  # of what is published
    assert (tmp_path / "loss_against_flops_dark.png").stat().st_size > 5000


def test_a_grid_without_frontiers_is_refused(place, tmp_path, capsys):
    path = tmp_path / "law.yaml"
    path.write_text(yaml.safe_dump({**GRID, "plot": {"x": "size"}}))
    assert law_page.main(["page", str(path), "--into", str(tmp_path)]) == 2
    assert "has no plot.frontiers" in capsys.readouterr().err


def test_the_table_of_another_grid_is_refused(place, capsys):
    rows, _, tmp_path = place
    other = [row.model_copy(update={"labels": {"width": "16"}}) for row in rows]
    write_table(tmp_path / "other.csv", other)
    for command in ("predict", "page"):
        assert law_page.main([command, str(tmp_path / "law.yaml"), str(tmp_path / "other.csv"),
                              "--into", str(tmp_path)]) == 2
        assert "other.csv has the axes width, and the grid has" in capsys.readouterr().err
    assert not (tmp_path / "law.csv").exists()


@pytest.mark.parametrize(("text", "said"), [
    (None, "README.md cannot be read"), ("# Law\n", "has no lines <!-- law -->")])
def test_a_page_without_its_place_is_refused_before_the_fits(place, capsys, monkeypatch, text,
                                                             said):
    rows, _, tmp_path = place
    write_table(tmp_path / "losses.csv", rows)
    page = tmp_path / "README.md"
    page.unlink() if text is None else page.write_text(text)
    monkeypatch.setattr(law_page, "fitted", lambda *_: pytest.fail("fitted"))
    words = [str(tmp_path / "law.yaml"), str(tmp_path / "losses.csv")]
    assert law_page.main(["page", *words, "--into", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "law.csv").exists()
    for command in ("page", "predict"):
        assert law_page.main([command, *words, "--into", str(tmp_path / "none")]) == 2
        assert "none is no directory; make it" in capsys.readouterr().err
