"""What strangers wrote is shown, and never obeyed, by terminals and pictures."""

from __future__ import annotations

import errno
import os
import re

import pytest

from megatron_spdf.command_line import refusing, say
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import counted, printable, printable_lines, sentence_of

HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\r\x08\x9b1m\u202ec\ud83d\u2028d"


@pytest.mark.parametrize(("number", "said"), [
    (errno.EACCES, "a/b: Permission denied; let this user at it"),
    (errno.ENOTDIR, "a/b: Not a directory; a part of the path is a file; correct the path"),
    (errno.ENOSPC, "a/b: No space left on device; make room on that disk"),
    (errno.EFBIG, "a/b: File too large; raise the limit of the size of files (ulimit -f)"),
    (errno.ELOOP, "a/b: Too many levels of symbolic links; links there lead in a circle"),
    (errno.EIO, "[Errno 5] Input/output error: 'a/b'"),
])
def test_an_error_of_the_system_comes_with_a_remedy(number, said, capsys):
    error = OSError(number, os.strerror(number), "a/b")
    assert sentence_of(error).startswith(said)
    assert sentence_of(FileNotFoundError("ours; make it")) == "ours; make it"
    ours = OSError(errno.ENOSPC, "the disk of x is full; make room", "x")
    assert sentence_of(ours) == str(ours)
    assert sentence_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).startswith(
        "No space left on device; make room")

    @refusing
    def fail() -> int:
        raise error

    assert fail() == 2 and said in capsys.readouterr().err


def test_a_terminal_is_given_nothing_to_obey(capsys):
    @refusing
    def fail() -> int:
        raise ValueError(f"file {HOSTILE}\n  - second line")

    assert fail() == 2
    say(HOSTILE)
    print(Table([Column("name")], [{"name": HOSTILE}]).text())
    out, err = capsys.readouterr()
    for text in (out.replace("\n", ""), err.replace("\n", "")):
        assert text.isprintable() and r"a\x1b]0;owned\x07" in text and r"\ud83d" in text
    assert err.splitlines()[1] == "  - second line"


def test_one_of_a_thing_is_not_several():
    assert [counted(n, "run") for n in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs",
                                                            "1,000 runs"]
    assert [counted(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]


def test_what_can_be_printed_stays_as_it_is():
    assert printable("Zürich 漢字 😀 $x_1$") == "Zürich 漢字 😀 $x_1$"
    assert printable_lines("a\n\n  b") == "a\n\n  b" and printable("a\nb") == r"a\nb"


@pytest.mark.parametrize("name", ["run$1", "a$x^{2", "$", "_hidden", "a_b^c$d$", "\\alpha$",
                                  "x\x1by"])
def test_names_are_no_formulas_and_are_in_the_legend(name):
    from megatron_spdf.reports.charts import stacked_bars

    svg = stacked_bars(["bar"], {name: [1.0], "other": [2.0]}, "x", "chart")
    assert printable(name) in [text.strip() for text in re.findall(r"<text [^>]*>([^<]*)<", svg)]


def test_a_picture_of_an_experiment_takes_any_label(tmp_path):
    from megatron_spdf.reports.experiment_plot import plot_results

    rows = [{"labels": {"_x": "$1", "b": "^{$"}, "mean": 1.0, "interval": None},
            {"labels": {"_x": "$2", "b": "^{$"}, "mean": 2.0, "interval": 0.1}]
    plot_results(rows, "_x", "b", [], tmp_path / "a.png")
    plot_results(rows, "_x", None, ["b"], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
