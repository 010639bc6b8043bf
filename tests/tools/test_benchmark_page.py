"""tools/benchmark.py page: from a report to pages, of a card that is not there."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from benchmarks import page

ROOT = Path(__file__).resolve().parents[2]
KEPT = "unstructured 75%, kept for the step"


def kernel(what: str, name: str, time: float, **ratios: float) -> dict:
    return {"what": what, "kernel": name, "weight": "8 x 8", "time (us)": time, **ratios}


def trained(what: str, seconds: float, **more: float) -> dict:
    return {"what": what, "sparsity (%)": 75.0, "step (s)": seconds, "tokens/s": 1000 / seconds,
            "TFLOP/s": 400.0, "MFU (%)": 40.0, "peak memory (GiB)": 30.0, "state (GiB)": 20.0,
            "planned step (s)": 1.25 * seconds, "planned peak (GiB)": 31.5,
            "planned state (GiB)": 20.0, "dense / step": 2.0 / seconds, **more}


def part_of(what: str, forward: float) -> dict:
    return {"what": what, "forward": forward, "backward": 2 * forward, "expand": 1.0}


REPORT = {
    "date": "2026-01-02T03:04+00:00", "device": "NVIDIA H100 80GB HBM3",
    "versions": {"torch": "2.99", "triton": "3.99"}, "scale": "h100",
    "command": "python tools/benchmark.py --suite h100",
    "parts": [
        {"part": "kernels", "state": "finished", "seconds": 50.0, "tables": {"kernels": [
            kernel(KEPT, "expand", 10.0, **{"floor / time": 0.9}),
            kernel(KEPT, "expand", 30.0, **{"floor / time": 0.7}),
            kernel(KEPT, "compress", 10.0, **{"floor / time": 0.65}),
            kernel("tiles of 64, 75%", "tiles, forward", 10.0, **{"dense / time": 3.0}),
            kernel("tiles of 64, 75%", "tiles, input gradient", 30.0, **{"dense / time": 2.6}),
            {"what": "stanford-stk", "note": "failed, ImportError: no stk"}]}},
        {"part": "training", "state": "finished", "seconds": 99.0, "tables": {
            "training": [trained("dense", 2.0, **{"MFU (%)": 51.23}), trained(KEPT, 2.08),
                         trained("tiles of 64, 75%", 0.9),
                         {"what": "2:4", "note": "failed, OutOfMemoryError: too large"}],
            "a step by part (ms)": [part_of("dense", 300.0), part_of(KEPT, 310.0)]}},
        {"part": "moves", "state": "out of time after 80 s", "seconds": 80.0, "tables": {"moves": [
            {"what": "rigl, the large model", "of a run (%)": 1.25},
            {"what": "set, the large model", "of a run (%)": 2.5}]}}]}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command on a report; its exit code and what it said."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def run(*reports: dict, pages: tuple[Path, ...] = ()) -> tuple[int, str]:
        names = []
        for number, report in enumerate(reports):
            names.append(tmp_path / f"{number}.json")
            names[-1].write_text(json.dumps(report))
        monkeypatch.setattr(sys, "argv", [
            "benchmark.py", "page", *map(str, names), "--directory", str(tmp_path / "docs/of"),
            *(["--page", *map(str, pages)] if pages else [])])
        code = importlib.import_module("benchmark").main()
        said = capsys.readouterr()
        return code, said.out + said.err
    return run


@pytest.fixture
def marked(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# A page\n\n<!-- gpu -->\nNothing yet.\n<!-- end of gpu -->\n\nThe rest.\n")
    return path


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("| ")]


def test_a_page_has_card_date_versions_targets_and_figures(run, marked, tmp_path):
    code, said = run(REPORT, pages=(marked,))
    card = "nvidia_h100_80gb_hbm3"
    files = [tmp_path / f"docs/of/{card}{end}" for end in (".json", ".svg", ".md")]
    assert code == 0 and said.split() == [*map(str, files), str(marked)]
    text = marked.read_text()
    assert text.startswith("# A page\n\n<!-- gpu -->\n") and "Nothing yet" not in text
    assert text.endswith("<!-- end of gpu -->\n\nThe rest.\n")
    assert ("Measured 2026-01-02 on one NVIDIA H100 80GB HBM3, torch 2.99, triton 3.99." in text
            and f"    {REPORT['command']}" in text)
    table = cells(text)
    assert table[1:9] == [
        ["GPT-3 XL, dense: share of the peak rate", "at least 50.0%", "51.2%", "yes"],
        ["unstructured 75%: step, over dense", "at most 1.030", "1.040", "no"],
        ["tiles of 64, 75%: tokens a second, over dense", "at least 2.00", "2.22", "yes"],
        ["tiles of 64, 75%: linear layers, forward and backward, over dense", "at least 2.50",
         "2.70", "yes"],
        ["expand: bandwidth, over a copy's", "at least 0.70", "0.75", "yes"],
        ["compress: bandwidth, over a copy's", "at least 0.70", "0.65", "no"],
        ["moves of rigl, the large model: share of a run", "at most 2.00%", "1.25%", "yes"],
        ["moves of set, the large model: share of a run", "at most 2.00%", "2.50%", "no"]]
    assert table[10:] == [
        ["dense", "500", "1.00", "51.2", "2.000", "2.500", "30.0", "31.5", "20.00"],
        [KEPT, "481", "0.96", "40.0", "2.080", "2.600", "30.0", "31.5", "20.00"],
        ["tiles of 64, 75%", "1,111", "2.22", "40.0", "0.900", "1.125", "30.0", "31.5", "20.00"]]
    links = re.findall(r"\]\((.*?)\)", text)
    assert links == [f"docs/of/{card}.svg", f"docs/of/{card}.md"]
    assert all((tmp_path / link).is_file() for link in links)
    whole = files[2].read_text()
    assert "failed, ImportError: no stk" in whole and "out of time after 80 s" in whole
    assert json.loads(files[0].read_text()) == REPORT
    picture = files[1].read_text()
    assert picture.startswith("<?xml") and "svg" in picture


def test_what_was_not_measured_is_not_mentioned(run, marked):
    report = copy.deepcopy(REPORT)
    report["parts"] = report["parts"][2:]
    assert run(report, pages=(marked,))[0] == 0
    text = marked.read_text()
    assert "rigl" in text and not re.search("GPT-3 XL|expand|tiles|svg|nan|None", text)


def test_memory_of_the_sparse_layers_is_what_the_peak_lost(run, marked):
    """Of 20 GiB of linear layers, which at 75% keep 5, and copies of 2.2."""
    report = copy.deepcopy(REPORT)
    rows = report["parts"][1]["tables"]["training"]
    rows[0] |= {"state (GiB)": 22.0, "peak memory (GiB)": 47.0}
    rows[1] |= {"state (GiB)": 7.0, "peak memory (GiB)": 34.2}
    assert run(report, pages=(marked,))[0] == 0
    (row,) = (row for row in cells(marked.read_text()) if "state of the sparse layers" in row[0])
    assert row[1:] == ["at most 0.37", "0.36", "yes"] and row[0].startswith(KEPT)


def test_reports_of_several_calls_show_every_command_without_its_directory(run, marked):
    first, second = copy.deepcopy(REPORT), copy.deepcopy(REPORT)
    first["command"] += " --parts kernels training --output /somewhere/else"
    second["command"] += " --parts moves"
    second["parts"] = [{**second["parts"][2], "state": "running"}]
    assert run(first, second, pages=(marked,))[0] == 0
    text = marked.read_text()
    assert "--parts kernels training --output DIRECTORY\n    python" in text
    assert "--parts moves" in text and "/somewhere" not in text
    whole = next(marked.parent.glob("docs/of/*.md")).read_text()
    assert "cut off; 80 s" in whole and "running" not in whole


def test_later_reports_fill_what_earlier_ones_lack(run, marked):
    first, second = copy.deepcopy(REPORT), copy.deepcopy(REPORT)
    first["parts"][1]["tables"] = {}
    second["parts"] = [second["parts"][1], {**second["parts"][2], "tables": {}}]
    second["date"] = "2026-01-03T00:00+00:00"
    assert run(first, second, pages=(marked,))[0] == 0
    text = marked.read_text()
    assert "51.2%" in text and "1.25%" in text and "2.70" in text and "Measured 2026-01-03" in text


def test_figures_of_a_cpu_and_what_is_no_report_are_refused(run, marked, tmp_path):
    before = marked.read_text()
    for reports, said in (
            [({**REPORT, "scale": "cpu"},), "figures of a CPU say nothing about a GPU; run"],
            [({"date": "x"},), "name a suite.json of tools/benchmark.py --suite"],
            [(REPORT, {**REPORT, "device": "NVIDIA H200"}), "a page is of one card"]):
        code, text = run(*reports, pages=(marked,))
        assert code == 2 and said in text
    other = tmp_path / "other.md"
    other.write_text("# No place\n")
    code, text = run(REPORT, pages=(marked, other))
    assert code == 2 and "has no lines <!-- gpu -->" in text
    assert marked.read_text() == before and not (tmp_path / "docs").exists()


@pytest.mark.parametrize(("part", "table", "column", "value", "said"), [
    (0, "kernels", "time (us)", 0.0, "time (us)=0.0 was never measured"),
    (0, "kernels", "floor / time", -1.0, "floor / time=-1.0 was never measured"),
    (0, "kernels", "time (us)", "fast", "time (us)='fast' is no number"),
    (1, "training", "step (s)", 0, "step (s)=0 was never measured"),
    (1, "training", "tokens/s", True, "tokens/s=True is no number"),
    (1, "training", "peak memory (GiB)", -1, "peak memory (GiB)=-1 was never measured"),
    (1, "a step by part (ms)", "forward", "x", "forward='x' is no number"),
    (1, "a step by part (ms)", "expand", 0.0, ""),  # of a dense step
    (1, "training", "sparsity (%)", 0.0, ""),
    (1, "training", "state (GiB)", None, ""),
    (2, "moves", "of a run (%)", -0.1, ""),  # noise
])
def test_figures_that_nothing_measures_are_refused(run, marked, part, table, column, value, said):
    report = copy.deepcopy(REPORT)
    report["parts"][part]["tables"][table][0][column] = value
    code, text = run(report, pages=(marked,))
    assert code == (2 if said else 0) and (f"{table}: {said}" if said else "") in text


def test_the_page_says_what_has_been_measured():
    text = (ROOT / "docs/performance.md").read_text()
    place = text.partition("<!-- gpu -->\n")[2].partition("<!-- end of gpu -->\n")[0]
    reports = [path for path in (ROOT / "docs/benchmarks").glob("*.json")]
    if not reports:
        assert "No figure of a GPU has been measured" in place
    for path in reports:
        assert path.with_suffix(".md").name in place
        assert "\n".join(page.summary(page.read_report(path))).strip() in place
