"""The page as any browser, screen reader or printer gets it: without rendering it."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest
from report_runs import Page, add_moves, pretraining, write

from megatron_spdf.reports import document
from megatron_spdf.reports.pens import COLORS

HOSTILE = "x</script><script>alert(1)</script>\"'`<!--\u202e"


@pytest.fixture(scope="module")
def html(report, tmp_path_factory):
    """Page of three seeds of two recipes, one of which moves its masks, with samples; all names and
    texts are hostile."""
    place = tmp_path_factory.mktemp("runs")
    found = []
    for level in (0.0, 0.75):
        for seed in (1, 2, 3):
            run = write(place / f"{HOSTILE.replace('/', '_')}{level}/seed={seed}",
                        pretraining(level, seed) | {"data": {"task": HOSTILE}}, 1e12, level)
            if level:
                add_moves(run, HOSTILE)
            (run / "samples").mkdir()
            (run / f"samples/{HOSTILE.replace('/', '_')}.txt").write_text(HOSTILE)
            found.append(str(run))
    output = place / "r.html"
    assert report([*found, "-o", str(output), "--title", HOSTILE]) == 0
    return output.read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_nothing_of_a_run_is_obeyed(html, page):
    assert html.count("<script") == 2 and "\u202e" not in html and "<!--" not in html
    assert r"\u202e" in page.words() and "alert(1)" in page.words()
    run = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(run) == 1
    digest = base64.b64encode(hashlib.sha256(run[0].encode()).digest()).decode()
    (policy,) = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
                      "; base-uri 'none'; form-action 'none'")
    data = json.loads(re.search(r'id="comparison">(.*?)</script>', html)[1])
    assert r"\u202e" in data["choices"][0]["label"]


def test_identifiers_are_there_once_and_references_lead_somewhere(html, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert referred <= set(ids) and {"runs", "compare", "masks", "samples"} <= referred


def test_headings_are_in_order(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_tables_have_heads_and_scroll_by_themselves(page):
    tables = page.named("table")
    boxes = [a for a in page.named("div") if a.get("class") == "scroll"]
    assert len(tables) == len(boxes) > 5
    for box in boxes:
        assert box["role"] == "group" and box["tabindex"] == "0" and box["aria-label"]
    for attributes in page.named("th"):
        assert attributes["scope"] in ("col", "row")
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", document.STYLE)


def test_plots_say_what_they_show(page):
    plots = page.named("svg")
    assert all(a["role"] == "img" and " ends at " in a["aria-label"] for a in plots)
    assert len({a["aria-label"] for a in plots}) == len(plots) == 17


def test_menus_have_labels_and_wait_for_the_script(page):
    (form,) = page.named("form")
    assert "hidden" in form and len(page.named("select")) == len(page.named("label")) == 2
    assert [a["label"] for a in page.named("optgroup")] == ["means over seeds", "runs"] * 2
    assert len(page.named("option")) == 16 and len(
        [a for a in page.named("option") if "selected" in a]) == 2


def test_no_width_is_larger_than_a_page(html):
    style = re.sub(r"@page[^}]*}|@media[^{]*", "", document.STYLE)
    widths = re.findall(r"(?<![\w-])(min-width|width): *([^;}]+)", style)
    for name, value in widths:
        assert re.fullmatch(r"0|100%|[\d.]+(em|rem)", value), (name, value)
        assert float(re.match(r"[\d.]+", value)[0]) <= 10 or value == "100%", (name, value)
    assert not re.search(r'style="[^"]*(?<!-)width: *\d{3}', html)


def luminance(color: str) -> float:
    channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_the_page(dark):
    """WCAG 2.1: 4.5 for text, 3 for what is drawn."""
    block = document.STYLE.split(":root {")[1 + dark].split("}")[0]
    colors = {name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:])
              for name, value in re.findall(r"(--\w+): (#\w+)", block)}
    for name in ("--text", "--soft", "--accent"):
        assert contrast(colors[name], colors["--page"]) >= 4.5, name
        assert contrast(colors[name], colors["--wash"]) >= 4.5, name
    drawn = ["--axis", "--warn", *(f"--c{i}" for i in range(10))]
    for name in drawn:
        assert contrast(colors[name], colors["--page"]) >= 3.0, name
    assert dark or [colors[f"--c{i}"] for i in range(10)] == [c.lower() for c in COLORS]
    assert len({colors[f"--c{i}"] for i in range(10)}) == 10


def test_a_page_is_printed_light_and_whole():
    assert "@media screen and (prefers-color-scheme: dark)" in document.STYLE
    printed = document.STYLE.split("@media print {")[1]
    assert "content-visibility: visible" in printed and "  nav, form { display: none; }" in printed
    assert document.STYLE.count("{") == document.STYLE.count("}")
