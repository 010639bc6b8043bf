"""The page of tools/report.py in headless Chromium: how wide it is, light and dark, and the pair
that a reader picks. tests/reports/test_page_structure.py holds what can be said without a browser.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from statistics import mean, stdev

import pytest
from report_runs import add_moves, pretraining, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium to render the page; apt-get install chromium")]
DARK, LIGHT = 0, 1
LOSSES = {0.0: {1: 5.0, 2: 5.25, 3: 5.1}, 0.75: {1: 5.5, 2: 5.5, 3: 5.7}, 0.5: {7: 5.2}}
# Writes what it finds into the title: after the static pair, and after another one was picked.
PROBE = """<script>
const seen = () => ["#pair-figures", "#pair-keys"].map(
  (name) => document.querySelector(name).innerHTML.replace(/>\\s+</g, "><")).concat(
  document.getElementById("pair-said").textContent, [...document.querySelectorAll(".pair g")]
  .filter((g) => /^series-/.test(g.getAttribute("class")) && getComputedStyle(g).display !== "none")
  .map((g) => g.getAttribute("class")).sort().join());
const found = {static: seen()};
</script>SCRIPT<script>
found.first = seen();
for (const [name, pick] of PICKED) document.getElementById(name).value = pick;
document.getElementById("pair").dispatchEvent(new Event("change"));
found.picked = seen();
found.width = document.documentElement.scrollWidth;
found.boxes = [...document.querySelectorAll(".scroll")].filter(
  (box) => box.scrollWidth > box.clientWidth).length;
found.columns = getComputedStyle(document.querySelector(".plots")).gridTemplateColumns;
found.page = getComputedStyle(document.body).backgroundColor;
found.line = getComputedStyle(document.querySelector("figure svg path[style*='--c1']")).stroke;
document.title = JSON.stringify(found);
</script>"""


@pytest.fixture(scope="module")
def page(report, tmp_path_factory) -> Path:
    """Three seeds of a dense and of a sparse recipe, one of which moves its masks, and another run,
    with long names."""
    place = tmp_path_factory.mktemp("runs")
    found = []
    for level, losses in LOSSES.items():
        for seed, loss in losses.items():
            name = f"size=0.4M,sparsity.level={level},optimizer.lr=0.004,model.init_std=0.05"
            run = write(place / name / f"seed={seed}", pretraining(level, seed), 4e12 * (1 - level),
                        level, loss=loss)
            if level == 0.75:
                add_moves(run)
            found.append(str(run))
    assert report([*found, "-o", str(place / "r.html")]) == 0
    return place / "r.html"


def rendered(page: Path, width: int, scheme: int) -> str:
    """The document after its scripts."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--window-size={width},1000",
         f"--blink-settings=preferredColorScheme={scheme}",
         f"--user-data-dir={page.parent / f'profile{width}'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def probed(page: Path, width: int, scheme: int, **picked: int) -> dict:
    """What the probe found, in a copy of the page whose policy lets it run."""
    text = page.read_text().replace("Content-Security-Policy", "X-None")
    before, own, after = re.split(r"(<script>.*?</script>)", text, flags=re.DOTALL)
    picks = json.dumps([[f"pair-{name}", str(number)] for name, number in picked.items()])
    copy = page.with_name(f"probe{width}.html")
    probe = PROBE.replace("PICKED", picks).replace("SCRIPT", own)
    copy.write_text(before + probe + after)
    title = re.search(r"<title>(.*?)</title>", rendered(copy, width, scheme), re.DOTALL)[1]
    return json.loads(html.unescape(title))


def test_the_script_may_run_under_the_policy(page):
    assert '<form id="pair" aria-label="Runs to compare" hidden>' in page.read_text()
    form = re.search(r'<form id="pair"[^>]*>', rendered(page, 1200, LIGHT))[0]
    assert "hidden" not in form


def test_a_desktop_has_the_page_without_scrolling_and_another_pair(page):
    # the choices: three seeds dense, three seeds at 75%, and all seven runs
    found = probed(page, 1200, LIGHT, a=1, b=0)
    assert found["width"] <= 1200 and found["boxes"] == 0 and len(found["columns"].split()) == 2
    assert found["first"] == found["static"]  # the script says what the page said without it
    figures, keys, said, shown = found["picked"]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in
             re.findall(r"<tr>(.*?)</tr>", figures)]
    dense, sparse = ([loss - 0.5 for loss in LOSSES[level].values()] for level in (0.0, 0.75))
    differences = [d - s for d, s in zip(dense, sparse, strict=True)]
    half = 4.302653 / 3**0.5  # Student's t of two degrees of freedom, at 97.5%
    assert cells[1] == ["validation loss", *(
        f"{mean(v):{sign}.4f} ± {half * stdev(v):.4f}"
        for v, sign in ((sparse, ""), (dense, ""), (differences, "+")))]
    assert ["training FLOPs", "1e+12", "4e+12", "4.00x"] in cells
    assert cells[0][1].endswith("</span>A: sparsity.level=0.75, 3 seeds")
    assert "sparsity.level</th><td class=\"text\">0.75</td><td class=\"text\">0.0<" in keys
    assert said == "Keys of the recipes: 1 differ, 7 are the same."
    # a line and its band in each of two plots
    assert shown == ",".join(["series-0 second"] * 4 + ["series-1 first"] * 4)
    assert found["page"] == "rgb(255, 255, 255)" and found["line"] == "rgb(213, 94, 0)"


def test_a_narrow_window_and_a_dark_one(page):
    found = probed(page, 800, DARK, a=2, b=8)
    assert found["width"] <= 800 and found["boxes"] == 0
    assert found["first"] == found["static"]
    figures, *_ = found["picked"]  # one seed each, another one: no interval
    assert ">4.5000<" in figures and ">4.7000<" in figures and ">+0.2000<" in figures
    assert found["page"] == "rgb(21, 24, 29)" and found["line"] == "rgb(240, 138, 60)"
