"""Numbers among a command's words: those at a bound, and the next ones."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_spdf.command_line import number, positive, positive_real


@pytest.mark.parametrize(("kind", "bounds", "taken", "refused", "rule"), [
    (int, {"least": 2}, ["2", "3"], ["1", "2.0", "nan", "x", ""], "whole number, at least 2"),
    (int, {"most": 5}, ["5", "-9"], ["6"], "whole number, at most 5"),
    (float, {"above": 0.5}, ["0.500001", "1e9"], ["0.5", "nan", "inf", "-inf"],
     "finite number, over 0.5"),
    (float, {"below": 0.5}, ["0.499", "-1"], ["0.5", "1e999"], "finite number, under 0.5"),
    (float, {"least": 0.0, "below": 1.0}, ["0", "0.9"], ["-0.1", "1"],
     "finite number, at least 0.0, under 1.0"),
    (float, {"above": 0.0, "most": 1.0}, ["1", "1e-9"], ["0", "1.01"],
     "finite number, over 0.0, at most 1.0")])
def test_a_number_at_its_bounds(kind, bounds, taken, refused, rule):
    parse = number(kind, **bounds)
    assert [parse(text) for text in taken] == [kind(text) for text in taken]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a {rule}$"):
            parse(text)


def test_what_is_counted_is_one_to_a_million_and_what_is_measured_over_nothing():
    assert (positive("1"), positive("1000000"), positive_real("1e-300")) == (1, 10**6, 1e-300)
    for parse, text in ((positive, "0"), (positive, "1000001"), (positive_real, "0.0")):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


SAYS = """import os, sys
from megatron_spdf import command_line
file = open(sys.argv[1], "w")
print("to nobody")
print("to nobody either", file=sys.stderr, flush=True)
os.system("echo from a library; echo and an error >&2")
file.write(str(file.fileno()) + repr(sys.stdin.read()))
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "<&-"])
def test_what_is_closed_takes_no_file_that_is_opened(tmp_path, closed):
    """As where a daemon or cron starts a run: the log must not get what libraries print."""
    done = subprocess.run(["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", SAYS,
                           str(tmp_path / "log")], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    number, read = (tmp_path / "log").read_text().split("'", 1)
    assert int(number) > 2 and read == "'"
    assert ("from a library" in done.stdout) == (">&-" not in closed.split())


PROGRAM = """import os, sys
from megatron_spdf.command_line import make_parser
parser = make_parser("a program")
parser.add_argument("path")
path = parser.parse_args().path
open(path, "w").write(path)
print(path, os.getpid(), os.environ["PYTHONUTF8"])
"""


def test_a_locale_of_another_encoding_changes_no_path_and_no_text(tmp_path):
    """The program starts again, with its words, number and streams."""
    given = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    (tmp_path / "program.py").write_text(PROGRAM)
    name = str(tmp_path / "gr\u00f6\u00dfe \u4e2d")
    with subprocess.Popen([sys.executable, "-s", str(tmp_path / "program.py"), name], env=given,
                          stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        said, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and said == f"{name} {child.pid} 1\n"
    assert (tmp_path / name).read_text(encoding="utf-8") == name


@pytest.mark.slow  # imports what pages are made with
def test_what_a_tool_reads_as_it_is_imported_has_an_encoding():
    given = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    tool = Path(__file__).parents[1] / "tools/report.py"
    done = subprocess.run([sys.executable, str(tool), "--help"], env=given, capture_output=True,
                          text=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: report.py"), done.stderr
