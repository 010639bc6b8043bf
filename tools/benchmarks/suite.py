"""All figures of one GPU in one command of less than nine minutes: a copy's bandwidth, kernels
against their floors and dense products, GPT-3 XL trained dense and with every pattern beside the
planner's bytes and seconds and where a step's time goes, peers in the same run, what moves of the
masks cost, models of other families, a model so small that the host may bind it, and the largest
GPT that one card trains, dense and sparse.

Every part runs in a process of its own and has a budget of seconds, to which comes what the parts
before it left over. Rows are printed, and suite.json written, as they come, so that a suite that is
cut off keeps what it has measured. A part that fails or runs out of time keeps its rows, and the
others go on. On a machine without a GPU everything is tiny: that shows that the suite runs, and
nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.environment import circumstances, render_circumstances
from megatron_spdf.files import new_file, write_file, write_json
from megatron_spdf.tables import Column, Table

ROOT = Path(__file__).resolve().parents[2]
SCALES = ("h200", "h100", "cpu")
# seconds on a GPU, 530 together
PARTS = {"kernels": 55, "training": 175, "peers": 50, "moves": 90, "families": 70, "host": 70,
         "largest": 20}
POLL = 0.5  # seconds between looks at the rows of the part that runs
SHOWN = 5  # figures of a row, as it comes
LIBRARIES = ("torch", "triton", "megatron-core", "transformers", "stanford-stk", "numpy")
NO_GPU = (
    "no GPU here: tiny sizes on the CPU, which show that the suite runs and say nothing about a GPU"
)


@dataclass
class Outcome:
    """What came of a part.

    Attributes:
        state: finished, out of time, or why it failed.
        seconds: that it took.
        tables: title -> rows, each column -> value; units are in the columns' names, `at` is when.
    """

    part: str
    state: str
    seconds: float
    tables: dict[str, list[dict]] = field(default_factory=dict)


def run(scale: str, parts: list[str], output: Path) -> int:
    """Runs the parts, and writes suite.json and suite.md after each.

    Args:
        scale: one of SCALES; without a GPU it is cpu in any case.
        output: the directory.

    Returns:
        The exit code: 0 where some part has figures.
    """
    import torch

    if not torch.cuda.is_available():
        scale = "cpu"
    output.mkdir(parents=True, exist_ok=True)
    report = {**circumstances(LIBRARIES), "scale": scale, "parts": []}
    print("\n".join([*render_circumstances(report), *([NO_GPU, ""] if scale == "cpu" else [])]),
          flush=True)
    spare, done = 0.0, report["parts"]

    def keep(outcome: Outcome) -> None:
        report["parts"] = [*done, asdict(outcome)]
        write_json(output / "suite.json", report)

    with _ended_by_sigterm():
        for part in parts:
            budget = PARTS[part] + spare
            command = [sys.executable, "-m", "benchmarks.suite_parts", part, scale]
            outcome = run_part(part, command, budget, keep)
            spare = budget - outcome.seconds
            keep(outcome)
            done = report["parts"]
            print("\n".join(render_part(done[-1])), flush=True)
            write_file(output / "suite.md", "\n".join(render(report)) + "\n")
    print(f"\n{output / 'suite.json'}, {output / 'suite.md'}")
    return 0 if any(outcome["tables"] for outcome in done) else 1


def run_part(part: str, command: list[str], budget: float,
             keep: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
    """Runs one part within its budget of seconds, and prints its rows as they come.

    Args:
        command: to which come the file for its rows, and the seconds it has.
        keep: called with what there is so far whenever a row has come.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark_suite_") as place:
        rows, said = Path(place) / "rows.jsonl", Path(place) / "said"
        with new_file(said) as log:
            child = subprocess.Popen([*command, str(rows), f"{budget:.0f}"], stdout=log,
                                     stderr=log, cwd=ROOT, env=_environment(),
                                     start_new_session=True)
        state, seen = "", 0
        try:
            while not state:
                left = started + budget - time.monotonic()
                try:
                    code = child.wait(min(POLL, max(left, 0.0)))
                    state = "finished" if code == 0 else f"failed ({code}): {_last_line(said)}"
                except subprocess.TimeoutExpired:
                    state = "" if left > POLL else f"out of time after {budget:.0f} s"
                found = _rows(rows)
                for row in found[seen:]:
                    print(f"{part}: {render_row(**row)}", flush=True)
                if found[seen:]:
                    keep(Outcome(part, "running", time.monotonic() - started, _tables(found)))
                seen = len(found)
        finally:
            _end(child)
        return Outcome(part, state, time.monotonic() - started, _tables(_rows(rows)))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the part that runs too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONWARNINGS": "ignore", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _end(child: subprocess.Popen) -> None:
    """Ends a part with all it started, which has a session of its own."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _rows(file: Path) -> list[dict]:
    """What a part has written: each a table's title and a row of it."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the part writes, or was ended while it wrote
            break
    return rows


def _tables(rows: list[dict]) -> dict[str, list[dict]]:
    tables: dict[str, list[dict]] = {}
    for written in rows:
        tables.setdefault(written["table"], []).append(written["row"])
    return tables


def _last_line(said: Path) -> str:
    return (said.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1][:300]


def render(report: dict) -> list[str]:
    """The report as Markdown."""
    lines = ["# Benchmark suite", "", f"{report['date']}, {report['device']}, "
             + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".", "",
             f"    {report['command']}", ""]
    if report["scale"] == "cpu":
        lines += [f"**{NO_GPU}.**", ""]
    for outcome in report["parts"]:
        lines += render_part(outcome)
    return lines


def render_part(outcome: dict) -> list[str]:
    lines = [f"## {outcome['part']}", "", f"{outcome['state']}; {outcome['seconds']:.0f} s", ""]
    for title, rows in outcome["tables"].items():
        names = dict.fromkeys(column for row in rows for column in row if column != "at")
        columns = [Column(name, lambda row, name=name: _cell(row.get(name))) for name in names]
        lines += [f"{title}:", "", Table(columns, rows).markdown()]
        lines.append("")
    return lines


def render_row(table: str, row: dict) -> str:
    """A row in a line, with as many of its figures as fit."""
    texts = [str(row[key]) for key in ("what", "kernel", "weight") if key in row]
    figures = [f"{key} {_cell(value)}" for key, value in row.items()
               if key not in ("what", "kernel", "weight", "at") and value is not None]
    return ", ".join([table, *texts]) + ": " + "; ".join(figures[:SHOWN])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
