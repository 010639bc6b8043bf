"""Plots of pages and experiments, by what is put on their axes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.ticker import EngFormatter

from megatron_spdf.planning.render import (
    flops_table,
    layouts_table,
    render_overview,
    sparsity_table,
    traffic_table,
)
from megatron_spdf.reports import charts, document, panels, plan_page, runs_page
from megatron_spdf.reports.charts import Line, Scale, draw_svg, line_chart, mean_line, stacked_bars
from megatron_spdf.reports.experiment_plot import plot_results
from megatron_spdf.reports.pens import COLORS, STYLES, Pen, color, pen
from megatron_spdf.reports.plan_page import render_plan_page
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.seeds import SameRecipe
from megatron_spdf.reports.spdf_table import accounts, own_table


@pytest.fixture
def drawn(monkeypatch):
    """Axes, name and size of every plot, in the place of its SVG."""
    found = []

    def keep(draw, name, size=(5.4, 3.3), about=""):
        axes = pyplot.figure().subplots()
        draw(axes)
        found.append((axes, name, size, about))
        return "<svg></svg>"

    monkeypatch.setattr(charts, "draw_svg", keep)
    yield found
    pyplot.close("all")


A = Line("a", Pen("#0072B2"), [1000.0, 3000.0], [2.0, 4.0], ((3000.0,), (5.0,)), name="series-0")
B = Line("b", Pen("#D55E00", "dashed"), [1000.0, 2000.0], [1.0, 3.0])


def test_colors_are_repeated_after_ten_with_other_dashes():
    assert len(set(COLORS)) == 10
    assert [color(n) for n in (0, 9, 10, 23)] == [COLORS[0], COLORS[9], COLORS[0], COLORS[3]]
    assert len({pen(n) for n in range(30)}) == 30 and pen(30) == pen(0)
    assert [pen(n).style for n in (9, 10, 20)] == list(STYLES)


def test_lines_their_points_and_what_is_said_of_them(drawn):
    line_chart([A, B, Line("c", pen(2), [], [])], "x (1)", "y (2)", "plot")
    ((axes, name, _, about),) = drawn
    *drawn_lines, nothing = axes.lines
    first, points, second = drawn_lines
    assert not len(nothing.get_xdata()) and not axes.get_legend()
    assert [list(line.get_xdata()) for line in drawn_lines] == [[1000, 3000], [3000], [1000, 2000]]
    assert [list(line.get_ydata()) for line in drawn_lines] == [[2, 4], [5], [1, 3]]
    assert [line.get_color() for line in drawn_lines] == ["#0072B2", "#0072B2", "#D55E00"]
    assert [line.get_gid() for line in drawn_lines] == ["series-0", "series-0", None]
    assert [line.get_linestyle() for line in drawn_lines] == ["-", "-", "--"]
    assert {line.get_alpha() for line in (first, second)} == {1.0} and points.get_marker() == "o"
    assert (axes.get_xlabel(), axes.get_ylabel(), name) == ("x (1)", "y (2)", "plot")
    assert about == "plot: y (2) over x (1). a ends at 4; b ends at 3; c has none."
    assert isinstance(axes.xaxis.get_major_formatter(), EngFormatter)
    assert axes.xaxis.get_major_formatter()(2500.0) == "2.5k"
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] > 0.0


def test_options_of_a_line_chart(drawn):
    many = Line("m", Pen("#009E73"), range(50), [3.0] * 50, ([0, 20, 49], [5.0, 4.0, 3.0]))
    line_chart([A, many], "x", "y", "plot", Scale(log_y=True, plain_x=True))
    line_chart([A, B], "x", "y", "plot", Scale(from_zero=True))
    line_chart([Line("c", Pen("#404040"), [1.0], [0.0])], "x", "y", "plot", Scale(from_zero=True))
    (first, *_), (zero, *_), (nothing, *_) = drawn
    assert first.get_yscale() == "log" and [line.get_alpha() for line in first.lines] == [
        1.0, None, 0.4, None]  # points show the course of the second
    assert [line.get_marker() for line in first.lines] == ["o", "o", "None", "o"]
    assert not isinstance(first.xaxis.get_major_formatter(), EngFormatter)
    assert zero.get_ylim() == (0.0, pytest.approx(1.08 * 5.0))
    assert nothing.get_ylim() == (0.0, pytest.approx(1.08e-9))


def test_a_loss_may_begin_above_the_axis(drawn):
    falls = Line("a", Pen("#404040"), range(20), [9.0, 8.0, *[3.0] * 17, 2.0])
    line_chart([falls], "x", "y", "plot", Scale(fall=0.1))
    assert drawn[0][0].get_ylim() == pytest.approx((1.95, 3.05))


def test_a_mean_over_runs_is_in_a_band_from_the_least_to_the_largest(drawn):
    line = mean_line("a", Pen("#404040"), [{1: (1, 2.0), 2: (3, 4.0), 3: (9, 9.0)},
                                           {2: (5, 8.0), 1: (3, 3.0)}, {}], [{2: (4, 1.0)}])
    assert (line.x, line.y) == ([2, 4], [2.5, 6]) and line.points == ([4], [1])
    assert line.band == ([2, 4], [3, 8])
    line_chart([line], "x", "y", "plot")
    (band,) = drawn[0][0].collections
    assert {tuple(v) for v in band.get_paths()[0].vertices} == {(2, 2), (4, 4), (2, 3), (4, 8)}
    assert mean_line("a", Pen("#404040"), [{1: (1, 2.0)}]).band == ((), ())
    assert mean_line("a", Pen("#404040"), [{}]).x == []
    assert len(mean_line("a", Pen("#404040"), [{i: (i, i) for i in range(96)}]).x) == 48
    assert len(mean_line("a", Pen("#404040"), [{i: (i, i) for i in range(96)}], most=500).x) == 96


def test_bars_are_stacked_in_the_order_of_their_parts(drawn):
    stacked_bars(["one", "two"], {"p": [1.0, 2.0], "q": [4.0, 0.5], "r": [3.0, 1.0]}, "GiB", "name",
                 (7.5, "usable"))
    stacked_bars(list("abcde"), {"p": [1.0] * 5}, "s", "name")
    (axes, _, size, about), (five, _, tall, _) = drawn
    bars = [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2)
            for bar in axes.patches]
    wanted = [(0, 1, 0), (0, 2, 1), (1, 4, 0), (2, 0.5, 1), (5, 3, 0), (2.5, 1, 1)]
    assert [pytest.approx(bar) for bar in wanted] == bars
    assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches[::2]] == list(COLORS[:3])
    assert [text.get_text() for text in axes.get_legend().texts] == ["p", "q", "r"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["one", "two"]
    assert axes.yaxis_inverted() and axes.get_xlabel() == "GiB"
    assert list(axes.lines[0].get_xdata()) == [7.5, 7.5] and not five.lines
    (said,) = axes.texts
    assert said.get_text() == "usable" and said.xy == (7.5, 1.0)
    assert said.xycoords == ("data", "axes fraction")
    assert about == "name: GiB. one 8; two 3.5."
    assert (size, tall) == ((10.5, pytest.approx(2.4)), (10.5, pytest.approx(3.4)))


def test_a_plot_is_the_same_svg_every_time():
    one, same = (draw_svg(lambda axes: axes.plot([1, 2], [3, 4]), "Loss", (2.0, 1.0))
                 for _ in range(2))
    assert one == same and one.startswith('<svg role="img" aria-label="Loss"')
    assert re.search(r'width="144(\.0)?pt" height="72', one)
    assert "date" not in one and not pyplot.get_fignums()


def test_no_text_or_bar_of_a_plot_is_black():
    svg = stacked_bars(["one", "two"], {"p": [1.0, 2.0], "q": [4.0, 0.5]}, "GiB", "bars",
                       (7.5, "usable"))
    texts = re.findall(r"<text ([^>]*)>", svg)
    assert len(texts) > 6 and all("fill: var(--" in text for text in texts)
    assert svg.count("fill: var(--c0)") == svg.count("fill: var(--c1)") == 3


def test_a_plot_has_the_colors_of_its_page_and_identifiers_of_its_own():
    lines = [Line(f"n{i} #0072b2", pen(i), [0.0, 1.23456], [1.0, 2.0], name=f"series-{i}")
             for i in range(10)]
    svg = line_chart(lines, "x of <b> 1.23456", "y", "A: plot")
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r'aria-label="[^"]*"', "", svg))
    variables = set(re.findall(r"var\((--\w+)\)", svg))
    assert variables == {"--axis", "--text", "--soft", "--grid", *(f"--c{i}" for i in range(10))}
    assert all(f"{name}:" in document.STYLE for name in variables)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    referred = set(re.findall(r'#([\w-]+)[")]', svg))
    assert len(ids) == len(set(ids)) and set(ids) == referred
    assert all(name.startswith("a-plot-") for name in ids)
    assert re.findall(r'class="(series-\d)"', svg) == [f"series-{i}" for i in range(10)]
    assert "x of &lt;b&gt; 1.23456" in svg and len(svg) < 20_000
    assert not {"metadata", "style", "xlink"} & set(re.findall(r"<(\w+)|xlink", svg))


def records(steps, **changes):
    return [{"kind": "train", "step": s, "tokens": 100 * s, "loss": 5.0 - s / 100, "lr": s / 1e4,
             "grad_norm": s / 10, "sparsity": 0.5, "flops": 7.0 * s, "tokens_per_second": 50.0 + s,
             "step_seconds": 2.0, "memory_bytes": s * 2**28, **changes} for s in steps]


def logged(name: str, train, valid=(), **fields) -> Logged:
    return Logged(**{"directory": Path("/runs") / name, "label": name, "values": {}, "train": train,
                     "valid": list(valid), "bytes": {}, "scores": {}, "notes": [], **fields})


@pytest.fixture
def curves(monkeypatch):
    """Lines and options of every chart of a report."""
    def of(*runs: Logged):
        found = {}
        monkeypatch.setattr(runs_page, "line_chart",
                            lambda lines, xlabel, ylabel, name, scale: found.setdefault(
                                (xlabel, ylabel), (lines, scale)) and "<svg></svg>")
        runs_page._curves("k", [SameRecipe((run,)) for run in runs],
                          {run.directory: pen(i) for i, run in enumerate(runs)})
        return found
    return of


def test_curves_of_a_report_are_what_the_logs_say(curves):
    a = logged("a", records(range(1, 11)), [{"step": 4, "loss": 4.5}, {"step": 10, "loss": 4.25},
                                            {"step": 99, "loss": 1.0}])
    b = logged("b", records(range(2, 6, 2), grad_norm=None))
    found = curves(a, b)
    x = {"consumed tokens": 100, "training FLOPs": 7, "minutes of training": 2 / 60}
    for label, factor in x.items():
        (first, second), options = found[label, "loss (nats)"]
        assert list(first.x) == pytest.approx([factor * s for s in range(1, 11)])
        assert list(first.y) == pytest.approx([5.0 - s / 100 for s in range(1, 11)])
        assert first.points == (pytest.approx([4 * factor, 10 * factor]), [4.5, 4.25])
        assert list(second.x) == pytest.approx([factor * s for s in (2, 4)])
        assert second.points == ([], []) and (first.label, second.label) == ("a", "b")
        assert (first.pen, second.pen) == (pen(0), pen(1))
        assert options == Scale(plain_x=label.startswith("minutes"), fall=0.1)
    others = {"gradient norm": (0.1, Scale(log_y=True)), "tokens/s": (None, Scale(from_zero=True)),
              "GiB": (0.25, Scale(from_zero=True)), "sparsity (%)": (None, Scale(from_zero=True)),
              "learning rate": (1e-4, Scale())}
    for label, (factor, wanted) in others.items():
        (first, second), options = found["step", label]
        assert list(first.x) == list(range(1, 11)) and options == wanted
        assert list(second.x) == ([] if label == "gradient norm" else [2, 4])
        if factor:
            assert list(first.y) == pytest.approx([factor * s for s in range(1, 11)])
    assert set(found["step", "sparsity (%)"][0][0].y) == {50.0}
    assert len(found) == 8


def test_what_no_run_has_logged_has_no_plot(curves):
    found = curves(logged("a", records([1, 2], grad_norm=None, lr=None)))
    assert ("step", "gradient norm") not in found and ("step", "learning rate") not in found
    assert ("step", "tokens/s") in found


@pytest.mark.parametrize(("seconds", "clock", "last"), [(7199.0, "minutes", 7199 / 60),
                                                        (7200.0, "hours", 2.0)])
def test_time_is_in_hours_from_two_on(curves, seconds, clock, last):
    found = curves(logged("a", records([1], step_seconds=seconds)))
    lines, options = found[f"{clock} of training", "loss (nats)"]
    assert lines[0].x == [pytest.approx(last)] and options.plain_x


@pytest.mark.parametrize(("count", "left"), [(79, 79), (80, 40), (119, 60), (120, 40), (121, 41)])
def test_curves_are_averaged_down_to_about_forty_points(count, left):
    x, y = charts.smooth(list(range(count)), [2.0 * i for i in range(count)])
    assert len(x) == len(y) == left and y == pytest.approx([2 * v for v in x])
    width = count // 40
    assert x[0] == pytest.approx(sum(range(width)) / width)


def row(mean, interval=None, **labels):
    return {"labels": labels, "mean": mean, "interval": interval}


@pytest.fixture
def pictures(monkeypatch, tmp_path):
    def of(rows, x, lines, above):
        kept = []
        monkeypatch.setattr(panels, "save_figure",
                            lambda figure, path: kept.append((figure, path)))
        plot_results(rows, x, lines, above, tmp_path / "p.png")
        ((figure, path),) = kept
        assert path == tmp_path / "p.png" and not pyplot.get_fignums()
        return figure.axes
    return of


def test_a_picture_for_every_panel_and_a_line_for_every_other_label(pictures):
    rows = [row(2.0 + i / 10, 0.5 if i else None, lr=lr, **{"model.width": width}, rule=rule,
                depth="1")
            for i, (rule, width, lr) in enumerate((r, w, lr) for r in "abcd" for w in ("8", "16")
                                                  for lr in ("0.1", "0.2"))]
    rows[5] = row(None, lr="0.2", **{"model.width": "8"}, rule="b", depth="1")
    axes = pictures(rows, "lr", "model.width", ["rule"])
    assert len(axes) == 6 and [a.get_visible() for a in axes] == [True] * 4 + [False] * 2
    assert [a.get_title() for a in axes[:4]] == [f"rule {r}" for r in "abcd"]
    first, second = axes[0], axes[1]
    (eight, sixteen) = first.containers
    assert [list(line[0].get_xdata()) for line in (eight, sixteen)] == [[0, 1], [0, 1]]
    assert list(eight[0].get_ydata()) == [2.0, 2.1] and list(sixteen[0].get_ydata()) == [2.2, 2.3]
    assert list(second.containers[0][0].get_ydata()) == [2.4]  # one cell is missing
    bars = [abs(s[1][1] - s[0][1]) / 2 for s in sixteen[2][0].get_segments()]
    assert bars == pytest.approx([0.5, 0.5])
    assert [s[1][1] - s[0][1] for s in eight[2][0].get_segments()] == pytest.approx([0.0, 1.0])
    assert [t.get_text() for t in first.get_legend().texts] == ["width 8, depth 1",
                                                                "width 16, depth 1"]
    assert [t.get_text() for t in first.get_xticklabels()] == ["0.1", "0.2"]
    assert first.get_xlabel() == "lr" and first.get_ylabel() == "validation loss (nats)"
    assert first.get_ylim() == pytest.approx((2.0 - 0.75, 3.5 + 0.75))
    assert [to_hex(c[0].get_color()).upper() for c in first.containers] == list(COLORS[:2])
    assert {t.get_rotation() for t in first.get_xticklabels()} == {0.0}


def test_means_that_are_near_have_room_and_long_labels_are_tilted(pictures):
    (axes,) = pictures([row(2.0, x="1234567"), row(2.02, x="b")], "x", None, [])
    assert axes.get_ylim() == pytest.approx((1.95, 2.07)) and axes.get_legend() is None
    assert {t.get_rotation() for t in axes.get_xticklabels()} == {35.0}
    (axes,) = pictures([row(2.0, x="123456"), row(2.2, x="b")], "x", None, [])
    assert {t.get_rotation() for t in axes.get_xticklabels()} == {0.0}
    assert axes.get_ylim() == pytest.approx((1.9, 2.3))


class Cells(HTMLParser):
    """Rows of cells of every table of a page, and all its text."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.cell, self.text = [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self.cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def overview():
    return json.loads((Path(__file__).parents[1] / "planning/stored_plans.json").read_text())[
        "overviews"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_plans_page_has_the_tables_of_its_text(overview, monkeypatch, number):
    facts = overview[number]
    monkeypatch.setattr(plan_page, "stacked_bars", lambda *_: "<svg></svg>")
    page = Cells(render_plan_page(facts, "a/b <c>.yaml"))
    tables = (flops_table, layouts_table, traffic_table, sparsity_table)
    wanted = [table(facts) for table in tables if table(facts).rows]
    cells = sum((Cells(table.html()).rows for table in wanted), [])
    assert sorted(map(str, page.rows)) == sorted(map(str, cells))
    said = " ".join(" ".join(page.text).split())
    text = " ".join(render_overview(facts).split())
    for misfit in facts["misfits"]:
        assert misfit["reason"] in said and misfit["reason"] in text
    assert ("Rejected layouts" in said) == bool(facts["misfits"])
    assert "Plan of a/b <c>.yaml" in said
    if number == 0:
        assert ("14.38B parameters, linear weights 60.00% sparse; 100B tokens in 339,084 steps, "
                "bf16; 24 x six, matrix products at 45% of peak (measured).") in said


def test_bars_of_a_plan(overview, monkeypatch):
    facts, drawn = overview[0], []
    monkeypatch.setattr(plan_page, "stacked_bars",
                        lambda *arguments: drawn.append(arguments) or "<svg></svg>")
    render_plan_page(facts, "x")
    (stages, memory, _, _, limit), (layouts, times, *_) = drawn
    assert stages == ["stage 0", "stage 1"] and limit == (pytest.approx(46.0), "usable")
    for number, stage in enumerate(facts["best"]["memory"]):
        assert "total" not in memory
        assert {k: v[number] for k, v in memory.items()} == {
            k: stage[k] / 2**30 for k in memory}
        assert sum(v[number] for v in memory.values()) == pytest.approx(stage["total"] / 2**30)
    assert len(layouts) == 8 and layouts[0] == "TP2 PP2 DP6 v6"
    for number, layout in enumerate(facts["layouts"]):
        assert sum(v[number] for v in times.values()) == pytest.approx(layout["step_seconds"])


@pytest.mark.parametrize(("share", "shown"), [(0.39, False), (0.41, True)])
def test_what_is_usable_is_drawn_where_a_stage_comes_near(overview, monkeypatch, share, shown):
    limits = []
    monkeypatch.setattr(plan_page, "stacked_bars", lambda *a: limits.append(a[4]) or "")
    total = max(stage["total"] for stage in overview[0]["best"]["memory"])
    request = overview[0]["request"] | {"usable_bytes": total / share}
    plan_page._memory_plot(overview[0] | {"request": request})
    assert bool(limits[0]) == shown


def test_misfits_and_traffic_that_are_not_there():
    facts = {"misfits": [], "best": {"traffic": []}}
    assert plan_page._misfits(facts) == []
    assert "One GPU sends nothing." in plan_page._traffic(facts)


def test_figures_of_a_logged_run():
    run = logged("a", records([2, 5, 9]), [{"step": 9, "loss": 2.0}],
                 bytes={"parameters": 1, "gradients": 20, "optimizer": 300, "sent_per_step": 7})
    assert (run.tokens, run.flops, run.sparsity, run.state_bytes) == (900, 63.0, 0.5, 321)
    assert run.tokens_per_second == 55.0 and run.peak_bytes == 9 * 2**28
    assert run.validation_loss == 2.0 and run.perplexity == pytest.approx(7.389056)
    assert run.hours() == pytest.approx([4 / 3600, 10 / 3600, 18 / 3600])
    train = {"tokens": 1000, "global_batch": 4, "sequence_length": 25}
    for values, steps in ((train, 10), ({**train, "tokens": 20}, 1),
                          ({**train, "tokens": 1060}, 11),
                          ({**train, "global_batch": "8"}, None), ({}, None)):
        assert logged("a", [], values={"train": values}).planned_steps == steps
    assert logged("a", [], values={"train": train, "checkpoint": "b"}).planned_steps is None
    nothing = logged("a", records([1], memory_bytes=None))
    assert (nothing.state_bytes, nothing.peak_bytes, nothing.perplexity) == (None, None, None)
    assert logged("a", [], [{"loss": 1e9}]).perplexity == pytest.approx(1.0142320547350045e304)


PUBLISHED = [
    ["GPT-2 Small", "0%", "2.43", "0.052", "2.48", "1.00x", "67.49", "63.42", "46.30", "13.38"],
    ["", "50%", "1.79", "0.052", "1.84", "1.34x", "67.39", "63.10", "45.74", "15.09"],
    ["", "75%", "1.46", "0.052", "1.52", "1.64x", "66.50", "62.64", "44.97", "17.14"],
    ["GPT-3 XL", "0%", "236.10", "0.524", "236.62", "1.00x", "68.10", "63.62", "47.71", "8.28"],
    ["", "50%", "141.87", "0.524", "142.40", "1.66x", "67.98", "63.47", "47.10", "9.21"],
    ["", "75%", "94.76", "0.524", "95.29", "2.48x", "67.66", "63.06", "46.96", "11.03"]]


def test_the_papers_table_is_the_printed_one():
    assert Cells("".join(runs_page._papers_tables())).rows[1:] == PUBLISHED


def run_of(name, level, flops, tokens=100, hidden=64, start=None, task=None) -> Logged:
    values = {"model": {"layers": 2, "hidden": hidden}, "data": {"task": task}}
    train = records([1], sparsity=level, flops=flops, tokens=tokens)
    return logged(name, train, values=values | ({"checkpoint": start} if start else {}))


def test_runs_are_held_against_the_dense_one_of_their_model_tokens_and_task():
    sparse, dense = run_of("s", 0.75, 10.0), run_of("d", 0.0, 40.0)
    others = [run_of("wide", 0.75, 9.0, hidden=128), run_of("long", 0.5, 8.0, tokens=200)]
    tuned = [run_of("s e2e", 0.0, 6.0, start="/runs/s", task="e2e"),
             run_of("s dart", 0.0, 2.0, start="/runs/s/checkpoints/step_1", task="dart"),
             run_of("d e2e", 0.0, 8.0, start="/runs/d/checkpoints/step_1", task="e2e"),
             run_of("of another", 0.0, 1.0, start="/runs/so", task="e2e")]
    found = accounts([tuned[3], sparse, *others, *tuned[:3], dense])
    assert [(a.run.label, a.start and a.start.label, a.pretraining, a.fine_tuning, a.together,
             a.speed_up) for a in found] == [
        ("s", None, 10.0, None, 10.0, 4.0), ("s e2e", "s", 10.0, 6.0, 16.0, 3.0),
        ("s dart", "s", 10.0, 2.0, 12.0, None), ("wide", None, 9.0, None, 9.0, None),
        ("long", None, 8.0, None, 8.0, None), ("d", None, 40.0, None, 40.0, 1.0),
        ("d e2e", "d", 40.0, 8.0, 48.0, 1.0), ("of another", None, None, 1.0, None, None)]
    pens = {a.run.directory: pen(3) for a in found}
    _, *rows = Cells(own_table([sparse, tuned[0], dense, tuned[2]], pens)).rows
    assert [row[:6] for row in rows] == [
        ["s", "75.00%", "10", "-", "10", "4.00x"],
        ["\u2003s e2e", "75.00%", "10", "6", "16", "3.00x"],
        ["d", "0.00%", "40", "-", "40", "1.00x"],
        ["\u2003d e2e", "0.00%", "40", "8", "48", "1.00x"]]


def test_many_scores_have_a_table_of_their_own():
    runs = [logged("a", records([1]), scores={f"m{i}": i / 8 for i in range(7)}),
            logged("b", records([1]), scores={"m6": 0.5}), logged("c", records([1]))]
    pens = {run.directory: pen(0) for run in runs}
    rows = Cells(own_table(runs, pens)).rows
    assert rows[0][-1] == "validation loss" and rows[4] == ["score", "a", "b"]
    assert rows[5] == ["m0", "0", "-"] and rows[11] == ["m6", "0.75", "0.5"] and len(rows) == 12
    beside = Cells(own_table(runs[1:], pens)).rows
    assert beside[0][-1] == "m6" and [row[-1] for row in beside[1:]] == ["0.5", "-"]
    assert Cells(own_table(runs[2:], pens)).rows[0][-1] == "validation loss"


def test_the_table_of_runs_is_what_the_logs_say(tmp_path):
    directory = tmp_path / "runs" / "a b"
    run = logged("a b", records([10, 20]), [{"step": 20, "loss": 2.5}], directory=directory,
                 bytes={"parameters": 2**20, "gradients": 2**21, "optimizer": 0,
                        "sent_per_step": 3 * 2**19},
                 values={"train": {"tokens": 3000, "global_batch": 1, "sequence_length": 100}})
    html = runs_page._runs_table([run], {directory: pen(3)}, tmp_path / "pages/r.html")
    head, row = Cells(html).rows
    assert row == ["a b", "50.00%", "2,000", "20 of 30", "2.5000", "12.18", "140", "65", "3.0",
                   "1.5", "5.00"]
    assert 'href="../runs/a%20b/recipe.yaml"' in html and "var(--c3)" in html
    assert [name.split(" (")[0] for name in head] == [
        "run", "sparsity", "tokens", "steps", "validation loss", "perplexity",
        "training FLOPs", "tokens/s, median", "state of rank 0", "sent per step", "peak memory"]


def test_parts_of_a_page():
    assert document.heading("a < b") == "<h2>a &lt; b</h2>" and document.heading(
        "c", 4) == "<h4>c</h4>"
    assert document.paragraph("a & b") == "<p>a &amp; b</p>"
    assert document.paragraph("a", "note") == '<p class="note">a</p>'
    assert document.bullets(["a", "<b>"]) == '<ul class="note"><li>a</li><li>&lt;b&gt;</li></ul>'
    assert document.figure("t", "<svg/>") == "<figure><h3>t</h3><svg/></figure>"
    assert document.figure("t", "<svg/>", "c", wide=True) == (
        "<figure class=wide><h3>t</h3><svg/><figcaption>c</figcaption></figure>")
    assert document.plots(["a", "b"]) == '<div class="plots">a\nb</div>'
    assert document.key(Pen(COLORS[2], "dotted")) == (
        '<span class="key" style="border-top:3px dotted var(--c2)"></span>')
    assert document.legend({"<a>": pen(0)}).count("<li>") == 1
    assert document.contents(["<h2 id=a-b>A &lt; b</h2>", "<h2>c</h2>", "<h3 id=d>e</h3>"]) == (
        '<nav aria-label="Sections"><ul><li><a href="#a-b">A &lt; b</a></li></ul></nav>')
    assert document.details("<a>", "<p>b</p>", True) == (
        "<details open><summary>&lt;a&gt;</summary><p>b</p></details>")
    html = document.page("T & t", ["one", "two"])
    assert html.startswith("<!DOCTYPE html>") and "<title>T &amp; t</title>" in html
    assert "<body>\n<main>\none\ntwo\n</main>\n</body>" in html and document.STYLE in html


@pytest.mark.parametrize(("loss", "said"), [(3.26194, "26.10"), (11.0, "59,874.14"),
                                            (1e9, "1.01e+304"), (None, None)])
def test_a_perplexity_that_has_blown_up_is_short(loss, said):
    assert runs_page._perplexity(logged("a", [], [{"loss": loss}] if loss else [])) == said


@pytest.mark.parametrize(("value", "said"), [
    (0.5, "0.5"), (9999.0, "9,999"), (10_000, "10k"), (123_456, "123.5k"), (2_048_000, "2.048M"),
    (300e9, "300G"), (1.25e12, "1.25T"), (6e15, "6000T")])
def test_large_numbers_have_prefixes(value, said):
    assert runs_page.si(value) == said
