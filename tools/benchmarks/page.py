"""From the suite's JSON to pages: tables and a picture with card, date, versions and command.

    python tools/benchmark.py page runs/suite/suite.json --page docs/performance.md README.md

Of several reports of one card the later ones' parts count. DIRECTORY/CARD.json, CARD.md with every
table and CARD.svg are written, and what was aimed for and what was measured of it goes between
`<!-- gpu -->` and `<!-- end of gpu -->` of each page. What was not measured is not mentioned.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from typing_extensions import TypedDict

from benchmarks import marked_page, suite
from megatron_spdf.files import write_file, write_json
from megatron_spdf.records.json_reader import read_json
from megatron_spdf.tables import Column, Table

MARK = "gpu"
WORDS = frozenset({"what", "kernel", "weight", "by", "note", "at"})  # columns of text
# Of two times, so that noise may make them negative
DIFFERENCES = frozenset({"longer with a move (s)", "the move alone (s)", "of a run (%)"})
_UNIT = re.compile(r"/|\(.+\)")
_NEVER_ZERO = re.compile(r"/|\bstep \(s\)$|^time \(us\)$")
KEPT, BY_LAYER = "unstructured 75%, kept for the step", "unstructured 75%, layer by layer"
MOVES_UNDER = 2.0  # percent of a run
BANDWIDTH = 0.7  # of a copy's


class Outcome(TypedDict):
    """See `suite.Outcome`."""

    part: str
    state: str
    seconds: float
    tables: dict[str, list[dict]]


class Report(TypedDict):
    """suite.json."""

    date: str
    device: str
    versions: dict[str, str]
    command: str
    scale: str
    parts: list[Outcome]


class Aim(TypedDict):
    """A line of the table of targets."""

    what: str
    aim: str
    measured: str
    reached: str


def render_pages(reports: Sequence[Path], directory: Path, pages: Sequence[Path]) -> list[Path]:
    """Writes everything, and returns the files.

    Raises:
        ValueError: a file is no report, or one without a GPU; two are of different cards; or a page
            has no place for it.
    """
    for page in pages:
        marked_page.place_on(page, MARK)
    report = merged([read_report(path) for path in reports])
    card = re.sub(r"[^a-z0-9]+", "_", report["device"].lower()).strip("_")
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / f"{card}{end}" for end in (".json", ".svg", ".md")]
    write_json(written[0], report)
    drawn = draw(report, written[1])
    picture = [f"![Tokens a second of GPT-3 XL, and where a step's time goes]({card}.svg)", ""]
    heading = f"# {report['device']}: the benchmark suite"
    write_file(written[2], "\n".join([
        heading, "", *summary(report), *(picture if drawn else []),
        *(line for part in report["parts"] for line in suite.render_part(part))]).rstrip() + "\n")
    for page in pages:
        link = os.path.relpath(written[2], page.parent)
        shown = [f"![Tokens a second, and where the time goes]({link.removesuffix('.md')}.svg)",
                 ""] if drawn else []
        marked_page.write_between(page, MARK, "\n".join([
            *summary(report), *shown, f"All tables: [{card}.md]({link})."]) + "\n")
    return [file for file in written if file.exists()] + list(pages)


def read_report(path: Path) -> Report:
    """Raises ValueError where the file is no report, one of a CPU, or has figures that nothing
    measures."""
    report = read_json(path, Report, remedy="name a suite.json of tools/benchmark.py --suite")
    if report["scale"] == "cpu":
        raise ValueError(f"{path} was measured on {report['device']}, and figures of a CPU say "
                         "nothing about a GPU; run `tools/benchmark.py --suite h100` on a machine "
                         "with one")
    for part in report["parts"]:
        for table, rows in part["tables"].items():
            for row in rows:
                for column, value in row.items():
                    _require_measured(path, table, column, value)
    return report


def _require_measured(path: Path, table: str, column: str, value: object) -> None:
    """Raises ValueError where what has a unit, or is a quotient, is no number that was measured."""
    if column in WORDS or value is None or not _UNIT.search(f"{table} {column}"):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        rule = "is no number"
    elif column in DIFFERENCES or value > 0.0 or value == 0.0 and not _NEVER_ZERO.search(column):
        return
    else:
        rule = "was never measured"
    raise ValueError(f"{path}: {table}: {column}={value!r:.40} {rule}; measure again, or mend it")


def merged(reports: list[Report]) -> Report:
    """One report, of each part the last outcome that has tables."""
    if len(devices := {report["device"] for report in reports}) > 1:
        raise ValueError(f"the reports are of {' and '.join(sorted(devices))}; a page is of one "
                         "card, name those of one")
    parts: dict[str, Outcome] = {}
    made: dict[str, str] = {}  # part -> command
    for report in reports:
        for part in report["parts"]:
            if part["tables"]:
                parts[part["part"]] = {**part, "state": _ended(part["state"])}
                made[part["part"]] = _portable(report["command"])
    commands = "\n".join(dict.fromkeys(made[part] for part in parts))
    return {**reports[-1], "command": commands, "parts": list(parts.values())}


def _ended(state: str) -> str:
    """A report whose writer was ended says that its last part is running."""
    return "cut off" if state == "running" else state


def _portable(command: str) -> str:
    """Without the directory that somebody's figures went to."""
    return re.sub(r" --output \S+", " --output DIRECTORY", command)


def summary(report: Report) -> list[str]:
    """Circumstances, targets, and the tables that matter most."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines = [f"Measured {report['date'][:10]} on one {report['device']}, {versions}.", "",
             *(f"    {command}" for command in report["command"].splitlines()), ""]
    if aims := list(targets(report)):
        columns = [Column("", "what"), Column("target", "aim"), Column("measured"),
                   Column("reached")]
        lines += [Table(columns, aims).markdown(), ""]
    if trained := rows_of(report, "training"):
        lines += [*_trained(trained), ""]
    for table, name in (("peers", "GPT-3 XL, by others"), ("host", "GPT-2 Small")):
        if rows := rows_of(report, table):
            lines += [*_beside(rows, name), ""]
    return lines


def targets(report: Report) -> Iterator[Aim]:
    """What was aimed for, as far as it was measured."""
    trained = {row["what"]: row for row in rows_of(report, "training")}
    dense = trained.get("dense", {})
    if (mfu := dense.get("MFU (%)")) is not None:
        yield _aim("GPT-3 XL, dense: share of the peak rate", mfu, 50, "{:.1f}%", least=True)
    kept = trained.get(KEPT, {})
    if faster := kept.get("dense / step"):
        yield _aim("unstructured 75%: step, over dense", 1 / faster, 1.03, "{:.3f}", least=False)
    for name, bound in ((KEPT, 0.37), (BY_LAYER, 0.28)):
        if (share := _state_share(dense, trained.get(name, {}))) is not None:
            yield _aim(f"{name}: state of the sparse layers in memory, over dense",
                       share, bound, "{:.2f}", least=False)
    for name, row in trained.items():
        if name.startswith("tiles") and (faster := row.get("dense / step")):
            yield _aim(f"{name}: tokens a second, over dense", faster, 2.0, "{:.2f}", least=True)
    yield from _kernel_targets(report)
    for row in rows_of(report, "moves"):
        yield _aim(f"moves of {row['what']}: share of a run", row["of a run (%)"], MOVES_UNDER,
                   "{:.2f}%", least=False)


def _state_share(dense: dict, sparse: dict) -> float | None:
    """What the sparse layers keep of the bytes of their weights, gradients and optimizer, copies
    and masks included: all of them, by the state that is gone, less what the peak lost."""
    columns = ("peak memory (GiB)", "state (GiB)")
    if any(row.get(column) is None for row in (dense, sparse) for column in columns):
        return None
    peak, state = (dense[column] - sparse[column] for column in columns)
    return 1.0 - peak / (state / (sparse["sparsity (%)"] / 100)) if state > 0.0 else None


def _kernel_targets(report: Report) -> Iterator[Aim]:
    rows = rows_of(report, "kernels")
    for name in dict.fromkeys(row["what"] for row in rows if row["what"].startswith("tiles")):
        own = [row for row in rows if row["what"] == name]
        seconds = math.fsum(row["time (us)"] for row in own)
        dense = math.fsum(row["time (us)"] * row["dense / time"] for row in own)
        yield _aim(f"{name}: linear layers, forward and backward, over dense", dense / seconds,
                   2.5, "{:.2f}", least=True)
    for kernel in ("expand", "compress"):
        own = [row for row in rows if row["kernel"] == kernel and row["what"] == KEPT]
        if own:
            seconds = math.fsum(row["time (us)"] for row in own)
            floor = math.fsum(row["time (us)"] * row["floor / time"] for row in own)
            yield _aim(f"{kernel}: bandwidth, over a copy's", floor / seconds, BANDWIDTH, "{:.2f}",
                       least=True)


def _aim(what: str, value: float, bound: float, form: str, least: bool) -> Aim:
    reached = value >= bound if least else value <= bound
    return {"what": what, "aim": f"at {'least' if least else 'most'} {form.format(bound)}",
            "measured": form.format(value), "reached": "yes" if reached else "no"}


def rows_of(report: Report, table: str) -> list[dict]:
    """The rows of a table that have figures."""
    return [row for part in report["parts"] for row in part["tables"].get(table, ())
            if "note" not in row]


def _trained(rows: list[dict]) -> list[str]:
    columns = [Column("GPT-3 XL, 2,048 tokens", "what"), Column("tokens/s", form=",.0f"),
               Column("over dense", "dense / step", ".2f"), Column("MFU (%)", form=".1f"),
               Column("step (s)", form=".3f"), Column("planned", "planned step (s)", ".3f"),
               Column("peak memory (GiB)", form=".1f"),
               Column("planned", "planned peak (GiB)", ".1f"),
               Column("state (GiB)", form=".2f")]
    return [Table(columns, rows).markdown()]


def _beside(rows: list[dict], name: str) -> list[str]:
    """Runs that the planner says nothing of."""
    columns = [Column(name, "what"), Column("tokens/s", form=",.0f"), Column("MFU (%)", form=".1f"),
               Column("step (s)", form=".3f"), Column("peak memory (GiB)", form=".1f")]
    if "GPU busy (%)" in rows[0]:
        columns.append(Column("GPU busy (%)", form=".0f"))
    return [Table(columns, rows).markdown()]


def draw(report: Report, path: Path) -> bool:
    """Draws tokens a second of every pattern, and where their steps' time goes; whether there was
    anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from megatron_spdf.files import save_figure
    from megatron_spdf.reports.charts import STYLE, color

    trained = rows_of(report, "training")
    if not trained:
        return False
    names = [row["what"] for row in trained]
    timed = {row["what"]: row for row in rows_of(report, "a step by part (ms)")}
    parts = [k for k in next(iter(timed.values()), {}) if k not in ("what", "at")]
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 1.2 + 0.34 * len(names)),
                                                sharey=True, layout="constrained")
        figure.suptitle(f"GPT-3 XL on one {report['device']}")
        left.barh(names, [row["tokens/s"] for row in trained], color=color(0))
        left.set(xlabel="tokens a second")
        left.invert_yaxis()
        starts = [0.0] * len(names)
        for number, part in enumerate(parts):
            spent = [timed.get(name, {}).get(part, 0.0) for name in names]
            right.barh(names, spent, left=starts, color=color(number), label=part)
            starts = [a + b for a, b in zip(starts, spent, strict=True)]
        right.set(xlabel="milliseconds of a step, part by part")
        if parts:
            figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        save_figure(figure, path)
    return True
