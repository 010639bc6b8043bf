"""tools/report.py: a page that stands by itself and says what the logs say."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from megatron_spdf.reports.runs import read_all
from megatron_spdf.reports.runs_page import smooth
from megatron_spdf.reports.spdf_table import accounts

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "img", "hr", "link", "path", "use"}


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("report", ROOT / "tools/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def write(directory: Path, recipe: dict, flops: float, sparsity: float, steps: int = 30,
          loss: float = 5.0) -> Path:
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    records = [{"kind": "bytes", "step": 1, "parameters": 2**20, "gradients": 2**20,
                "optimizer": 2**21,
                "sent_per_step": 3 * 2**20}]
    records += [{"kind": "train", "step": s, "tokens": 100 * s, "loss": loss - s / 100, "lr": 1e-3,
                 "grad_norm": 1.0,
                 "sparsity": sparsity, "flops": flops * s / steps, "tokens_per_second": 50.0,
                 "step_seconds": 2.0,
                 "memory_bytes": 2**30} for s in range(1, steps + 1)]
    records.append({"kind": "valid", "step": steps, "loss": loss - 0.5})
    (directory / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def pretraining(sparsity: float) -> dict:
    return {"sparsity": {"level": sparsity},
            "model": {"layers": 2, "hidden": 64, "heads": 4, "vocab_size": 300},
            "train": {"tokens": 3000, "global_batch": 1, "sequence_length": 100}}


@pytest.fixture
def runs(tmp_path):
    """A dense and a sparse pre-training run, and a fine-tuning run on E2E from each."""
    dense = write(tmp_path / "runs/dense", pretraining(0.0), 4e12, 0.0)
    sparse = write(tmp_path / "runs/s75 <b>&", pretraining(0.75), 1.6e12, 0.75)
    found = [dense, sparse]
    for name, start in (("dense_e2e", dense), ("s75_e2e", sparse)):
        checkpoint = start / "checkpoints" / "step_00000030"
        tuned = write(tmp_path / "runs" / name,
                      {"checkpoint": str(checkpoint), "data": {"task": "e2e"}}, 0.4e12, 0.0)
        (scored := tuned / "evaluation/e2e_test").mkdir(parents=True)
        (scored / "scores.json").write_text(json.dumps({"task": "e2e",
                                                        "scores": {"all": {"BLEU": 61.25}}}))
        found.append(tuned)
    return found


class Page(HTMLParser):
    """Text, links and tags; every tag that opens must close."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.links, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k,
                       v in attributes if k in ("href", "src", "xlink:href")
                       and not (v or "").startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k,
                       v in attributes if k in ("href", "src", "xlink:href")
                       and not (v or "").startswith("#")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_stands_by_itself(report, runs, tmp_path, capsys):
    output = tmp_path / "pages" / "report.html"
    output.parent.mkdir()
    assert report([*map(str, runs), "-o", str(output), "--title", "Mine & <others>"]) == 0
    assert "4 runs" in capsys.readouterr().out
    page = Page(output.read_text())
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 16  # eight plots of each kind
    assert not re.search(r"url\((?!#)|@import", output.read_text())
    assert len(page.links) == 8  # each recipe, above and below
    for link in page.links:
        assert (output.parent
                / Path(link.replace("%20", " ").replace("%3C", "<").replace("%3E", ">").replace(
            "%26", "&"))).is_file()
    text = " ".join(page.text)
    assert "Mine & <others>" in text and "s75 <b>&" in text


def test_page_says_what_the_logs_say(report, runs, tmp_path):
    assert report([*map(str, runs), "-o", str(tmp_path / "r.html")]) == 0
    text = re.sub(r"\s+", " ", " ".join(Page((tmp_path / "r.html").read_text()).text))
    for said in ("75.00%", "30 of 30", "4.5000", "4e+12", "1.6e+12", "1.00x", "2.20x", "61.25",
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


def test_smoothing_keeps_means_and_short_curves():
    assert smooth([1, 2, 3], [4.0, 5.0, 6.0]) == ([1, 2, 3], [4.0, 5.0, 6.0])
    x, y = smooth(list(range(400)), [float(i) for i in range(400)])
    assert len(y) == 40 and sum(y) / 40 == pytest.approx(199.5) and x == y


@pytest.mark.parametrize(("damage", "said"), [
    (lambda run: (run / "log.jsonl").unlink(), "it has no log.jsonl"),
    (lambda run: (run / "evaluation/e2e_test/scores.json").write_text("{"),
     "scores.json, line 1: not JSON"),
    (lambda run: (run / "log.jsonl").write_text(""), "holds no training step yet"),
])
def test_what_cannot_be_read_gets_a_sentence(report, runs, tmp_path, capsys, damage, said):
    damage(runs[2])
    assert report([*map(str, runs), "-o", str(tmp_path / "r.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and not (tmp_path / "r.html").exists()


def test_a_run_named_twice_is_refused(report, runs, tmp_path, capsys):
    assert report([str(runs[0]), str(runs[0]), "-o", str(tmp_path / "r.html")]) == 2
    assert "named more than once" in capsys.readouterr().err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to render the page")
@pytest.mark.parametrize("width", [1280, 794])  # a desktop; A4 at 96 dots an inch
def test_rendered_page_has_no_sideways_overflow(report, runs, tmp_path, width):
    """A probe appended to the page writes into its title how wide its content is."""
    output = tmp_path / "r.html"
    assert report([*map(str, runs), "-o", str(output)]) == 0
    probe = ("<script>document.title = document.documentElement.scrollWidth + ' ' + "
             "document.querySelectorAll('svg').length</script>")
    output.write_text(output.read_text().replace("</body>", f"{probe}</body>"))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                           f"--window-size={width},1000",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                           output.as_uri()],
                          capture_output=True, text=True, timeout=300, check=True)
    found, plots = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
    assert found <= width and plots == 16


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


def test_moves_of_masks_are_shown_in_all_and_by_layer(report, runs, tmp_path):
    def seen(share: float, overlap: float, age: float) -> dict:
        return {"share": share, "overlap": overlap, "age": age}

    records = [{"kind": "mask", "step": step, "algorithm": "rigl", "update": step // 10,
                "moved": 30, "seconds": 0.5, **seen(share, overlap, age),
                "layers": {"0": seen(share / 2, 0.9, 2.5), "1": seen(1.5 * share, overlap, age)}}
               for step, share, overlap, age in ((10, 0.3, 0.7, 0.25), (20, 0.1, 0.625, 1.125))]
    with (runs[1] / "log.jsonl").open("a") as log:
        log.writelines(json.dumps(r) + "\n" for r in records)
    (logged,) = read_all([runs[1]])
    assert logged.moves == records
    output = tmp_path / "moving.html"
    assert report([*map(str, runs), "-o", str(output)]) == 0
    text = " ".join("".join(Page(output.read_text()).text).split())
    assert "Masks that move" in text and "rigl, 2 moves, the last at step 20" in text
    for title in ("Active entries that move", "Active entries that are as at first", "Mean age"):
        assert title in text
    table = text[text.index("rigl, 2 moves"):]
    # means over the moves, then the last one
    assert "all20.000%10.000%62.50%1.12" in table.replace(" ", "")
    assert "010.000%5.000%90.00%2.50130.000%15.000%62.50%1.12" in table.replace(" ", "")
    still = tmp_path / "still.html"
    assert report([str(runs[0]), "-o", str(still)]) == 0
    assert "Masks that move" not in still.read_text()
