"""tools/report.py: a page that stands by itself and says what the logs say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from report_runs import Page, add_moves, pretraining, write

from megatron_spdf.reports.charts import smooth
from megatron_spdf.reports.runs import read_all
from megatron_spdf.reports.spdf_table import accounts


@pytest.mark.slow
def test_page_stands_by_itself(report, runs, tmp_path, capsys):
    output = tmp_path / "pages" / "report.html"
    output.parent.mkdir()
    assert report([*map(str, runs), "-o", str(output), "--title", "Mine & <others>"]) == 0
    assert "4 runs" in capsys.readouterr().out
    page = Page(output.read_text())
    assert not {"img", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert len(page.named("svg")) == 18  # eight plots of each kind, and two of the pair
    assert not re.search(r"url\((?!#)|@import", output.read_text())
    assert len(page.links) == 8  # each recipe, above and below
    for link in page.links:
        assert (output.parent / unquote(link)).is_file()
    assert "Mine & <others>" in page.words() and "s75 <b>&" in page.words()
    assert len(output.read_bytes()) < 250_000


@pytest.mark.slow
def test_page_says_what_the_logs_say(report, runs, tmp_path):
    assert report([*map(str, runs), "-o", str(tmp_path / "r.html")]) == 0
    text = Page((tmp_path / "r.html").read_text()).words()
    for said in ("75.00%", "30", "4.5000", "4e+12", "1.6e+12", "1.00x", "2.20x", "61.25",
                 "2.50x", "67.49",
                 "236.62", "contradicts itself"):
        assert said in text, said


def test_sums_and_speed_ups(runs):
    found = {run.label: (start and start.label, together, speed_up)
             for run, start, together, speed_up in accounts(read_all(runs))}
    assert found["dense"] == (None, 4e12, 1.0)
    assert found["dense_e2e"] == ("dense", pytest.approx(4.4e12), 1.0)
    assert found["s75_e2e"] == ("s75 <b>&", pytest.approx(2.0e12), pytest.approx(2.2))


def test_a_fine_tuning_run_by_itself_has_no_sum(runs):
    ((_, start, together, speed_up),) = accounts(read_all(runs[2:3]))
    assert (start, together, speed_up) == (None, None, None)


def test_time_counts_the_steps_between_records(tmp_path):
    run = write(tmp_path / "a", pretraining(0.0), 1.0, 0.0)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [r for r in lines if r["kind"] != "train" or r["step"] % 10 == 0]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    (logged,) = read_all([run])
    assert logged.hours() == pytest.approx([20 / 3600, 40 / 3600, 60 / 3600])


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write(tmp_path / place / "s75", pretraining(0.75), 1.0, 0.75) for place in ("a", "b")]
    assert [r.label for r in read_all(runs)] == ["a/s75", "b/s75"]


@pytest.mark.parametrize(("names", "labels"), [
    (["size=1,lr=2,masks=set/seed=1", "size=1,lr=3,masks=set/seed=1"], ["lr=2", "lr=3"]),
    (["size=1,lr=2/seed=1", "size=1,lr=2/seed=2"], ["seed=1", "seed=2"]),
    (["a=1,b", "a=1,c"], ["b", "c"]), (["a=1", "a=1,b=1"], ["a=1", "a=1,b=1"]),
    (["a=1/x", "a=1/y"], ["x", "y"]), (["one=1"], ["one=1"])])
def test_what_is_in_the_names_of_all_runs_is_left_out(tmp_path, names, labels):
    runs = [write(tmp_path / name, pretraining(0.75), 1.0, 0.75) for name in names]
    assert [run.label for run in read_all(runs)] == labels


def test_smoothing_keeps_means_and_short_curves():
    assert smooth([1, 2, 3], [4.0, 5.0, 6.0]) == ([1, 2, 3], [4.0, 5.0, 6.0])
    x, y = smooth(list(range(400)), [float(i) for i in range(400)])
    assert len(y) == 40 and sum(y) / 40 == pytest.approx(199.5) and x == y


@pytest.mark.parametrize(("damage", "said"), [
    (lambda run: (run / "recipe.yaml").unlink(), "it has no recipe.yaml"),
    (lambda run: (run / "evaluation/e2e_test/scores.json").write_text("{"),
     "scores.json, line 1: not JSON"),
])
def test_what_cannot_be_read_gets_a_sentence(report, runs, tmp_path, capsys, damage, said):
    damage(runs[2])
    assert report([*map(str, runs), "-o", str(tmp_path / "r.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and not (tmp_path / "r.html").exists()


def test_a_run_without_a_record_yet_is_left_out_with_a_line(report, runs, tmp_path, capsys):
    (runs[1] / "log.jsonl").write_text("")
    (runs[2] / "log.jsonl").unlink()
    output = tmp_path / "r.html"
    assert report([*map(str, runs), "-o", str(output)]) == 0
    said, page = capsys.readouterr(), Page(output.read_text()).words()
    for sentence in (f"left out: {runs[1]}/log.jsonl holds no training step yet",
                     f"left out: {runs[2]} is no run yet: it has no log.jsonl"):
        assert sentence in said.err and sentence in page
    assert "2 runs" in said.out and "2 runs, " in page
    output.unlink()
    for few, sentence in ((runs[1:3], "no run has a record"), (runs[2:3], "it has no log.jsonl")):
        assert report([*map(str, few), "-o", str(output)]) == 2
        assert sentence in capsys.readouterr().err and not output.exists()


def test_a_run_named_twice_is_refused(report, runs, tmp_path, capsys):
    assert report([str(runs[0]), str(runs[0]), "-o", str(tmp_path / "r.html")]) == 2
    assert "named more than once" in capsys.readouterr().err


def test_losses_that_are_not_finite_are_left_out_with_a_line(report, runs, tmp_path):
    log = runs[0] / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and record["step"] % 3 == 0 or record["kind"] == "valid":
            record["loss"] = float("nan")
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    log = runs[1] / "log.jsonl"
    log.write_text(re.sub(r'"loss": [0-9.]+', '"loss": NaN', log.read_text()))
    output = tmp_path / "r.html"
    assert report([*map(str, runs), "-o", str(output)]) == 0
    text = " ".join(Page(output.read_text()).text)
    assert f"{runs[0]}/log.jsonl: 10 train records without a finite loss are left out" in text
    assert f"{runs[1]}/log.jsonl: 30 train records" in text and "nan" not in text.lower()


@pytest.mark.slow
def test_moves_of_masks_are_shown_in_all_and_by_layer(report, runs, tmp_path):
    records = add_moves(runs[1])
    (logged,) = read_all([runs[1]])
    assert logged.moves == records
    output = tmp_path / "moving.html"
    assert report([*map(str, runs), "-o", str(output)]) == 0
    page = Page(output.read_text())
    text = page.words()
    assert "Masks that move" in text and "rigl, 2 moves, the last at step 20" in text
    plots = [svg["aria-label"] for svg in page.named("svg")]
    for said in ("Active entries that move: moved (%) over step. s75 <b>& ends at 10.",
                 "Moved by layer, mean of all moves: moved (%) over layer. s75 <b>& ends at 30.",
                 "Overlap with the first mask: as at first (%) over step. s75 <b>& ends at 62.5.",
                 "Overlap by layer, after the last move: as at first (%) over layer. s75 <b>& ends "
                 "at 62.5.", "Mean age of active entries: age (moves) over step. s75 <b>& ends at "
                 "1.125.", "Mean age by layer, after the last move: age (moves) over layer. s75 "
                 "<b>& ends at 1.125.", "Number of entries that move: entries moved over step. s75 "
                 "<b>& ends at 2e+04."):
        assert f"Masks: {said}" in plots
    # entries in all; means over the moves, then the last one; seconds in all
    assert "s75 <b>& rigl 2 20 30,000 20.000% 10.000% 62.50% 1.12 1.00" in text
    table = text[text.index("rigl, 2 moves"):]
    assert "all 20.000% 10.000% 62.50% 1.12" in table
    assert "0 10.000% 5.000% 90.00% 2.50 1 30.000% 15.000% 62.50% 1.12" in table
    still = tmp_path / "still.html"
    assert report([str(runs[0]), "-o", str(still)]) == 0
    assert "Masks that move" not in still.read_text()


def test_masks_that_only_lose_entries_have_no_overlap_and_no_age(report, runs, tmp_path):
    log = runs[1] / "log.jsonl"
    with log.open("a") as file:
        file.writelines(json.dumps({"kind": "mask", "step": s, "algorithm": "gmp", "share": 0.1,
                                    "layers": {"0": {"share": 0.1}}}) + "\n" for s in (10, 20))
    assert report([str(runs[1]), "-o", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text())
    plots = [svg["aria-label"] for svg in page.named("svg") if "Masks" in svg["aria-label"]]
    assert len(plots) == 1 and "Active entries that move" in plots[0]
    assert "gmp 2 20 - 10.000% 10.000% - - -" in page.words()


def test_one_run_has_no_comparison_and_no_script(report, runs, tmp_path):
    assert report([str(runs[0]), "-o", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text())
    assert not page.named("script") and "Comparison" not in page.words()
    assert "samples" not in page.words() and "script-src" not in (tmp_path / "r.html").read_text()


def test_a_name_that_is_no_text_is_shown_with_escapes(report, tmp_path):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))
    write(place, pretraining(0.0), 1.0, 0.0)
    assert report([str(place), "-o", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text())
    assert r"a\udcff" in page.words() and page.links[0] == "a%FF/recipe.yaml"
