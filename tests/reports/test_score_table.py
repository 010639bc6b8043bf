"""Scores of fine-tuned runs by hand: means, intervals, and differences of the same seeds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from test_comparison import logged

from megatron_spdf.reports import score_table
from megatron_spdf.reports.score_table import (
    ScoreRow,
    read_scores,
    render_scores,
    score_rows,
    write_scores,
)


def row(masks: str, mode: str, seed: int, bleu: float | None) -> ScoreRow:
    return ScoreRow(labels={"masks": masks, "mode": mode}, seed=seed, pretraining_flops=3e12,
                    fine_tuning_flops=1e12 + seed, pretraining_loss=2.5, fine_tuning_loss=0.1 + 0.2,
                    scores={"BLEU": bleu, "NIST": 4.0})


ROWS = [row("dense", "dense", 1, 0.50), row("dense", "dense", 2, 0.60),
        row("75%", "dense", 1, 0.44), row("75%", "dense", 2, 0.52), row("75%", "sparse", 3, None)]
ORDER = [{"masks": "dense"}, {"masks": "75%", "mode": "dense"}, {"masks": "75%", "mode": "sparse"}]


def test_a_table_is_read_as_it_was_written(tmp_path):
    write_scores(tmp_path / "scores.csv", ROWS)
    assert read_scores(tmp_path / "scores.csv") == ROWS
    write_scores(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize(("old", "new"), [("seed,", "seeds,"), ("dense,dense,1,", "dense,dense,x,"),
                                          ("dense,dense,1,", "dense,1,")])
def test_a_damaged_table_is_refused(tmp_path, old, new):
    write_scores(path := tmp_path / "scores.csv", ROWS)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match="scores.csv"):
        read_scores(path)


def test_differences_are_those_of_the_same_seeds():
    """0.06 and 0.08: mean 0.07, and 12.706 x 0.01414 / sqrt(2) = 0.1271 by Student's t; the third
    place has no seed in common with the second."""
    text = " ".join(render_scores(ROWS, ORDER).split())
    assert ("| 75% | dense | 4e+12 | 2.5000 ± 0.0000 | 0.4800 ± 0.5082 | 4.0000 ± 0.0000 | 2 |"
            in text)
    assert "| 75% | sparse | 4e+12 | 2.5000 | - | 4.0000 | 1 |" in text
    assert "| dense, less 75%, dense | +0.0700 ± 0.1271 | +0.0000 ± 0.0000 | 2 |" in text
    assert "less 75%, sparse" not in text and "difference" not in render_scores(ROWS, [])


def test_a_row_has_the_figures_of_both_of_its_runs(monkeypatch, tmp_path):
    """The loss at the end of pre-training, and the lowest of fine-tuning; FLOPs of each; scores of
    the whole test set. What is not done or not scored has no row."""
    tuned = SimpleNamespace(done=True, scored=True, start=tmp_path / "a", seed=2, scores=tmp_path,
                            trial=SimpleNamespace(output=tmp_path / "b"), labels={"masks": "75%"})
    (tmp_path / "scores.json").write_text(json.dumps(
        {"scores": {"all": {"BLEU": 0.5, "NIST": None}, "seen": {"BLEU": 0.75}}}))
    step = {"kind": "train", "step": 9, "tokens": 1, "loss": 1.0, "sparsity": 0.5,
            "tokens_per_second": 1.0, "step_seconds": 1.0}
    runs = {tmp_path / name: logged(name, valid=[{"step": i, "loss": x} for i, x in losses],
                                    train=[{**step, "flops": flops / 2}, {**step, "flops": flops}])
            for name, losses, flops in (("a", [(1, 2.0), (2, 2.5)], 4e12),
                                        ("b", [(1, 0.5), (2, 0.25), (3, 0.75)], 1e12))}
    monkeypatch.setattr(score_table, "read_all", lambda paths: [runs[path] for path in paths])
    others = [SimpleNamespace(**{**vars(tuned), name: False}) for name in ("done", "scored")]
    assert score_rows([others[0], tuned, others[1]]) == [ScoreRow(
        labels={"masks": "75%"}, seed=2, pretraining_flops=4e12, fine_tuning_flops=1e12,
        pretraining_loss=2.5, fine_tuning_loss=0.25, scores={"BLEU": 0.5, "NIST": None})]
