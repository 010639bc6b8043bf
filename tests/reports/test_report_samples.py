"""Samples of text in a report: answers of a task side by side, and files that a run has kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megatron_spdf.reports.pens import pen
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.samples import LONGEST, samples_section, spread


def run(directory: Path, **files: str) -> Logged:
    for name, text in files.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix("" if path.stem.startswith("reference0") else ".txt").write_text(text)
    return Logged(directory, directory.name, {}, [], [], {}, {}, [])


def shown(*runs: Logged) -> list[tuple[str, list[tuple[str, str]]]]:
    """Heading, and the name and text of every row of each sample below it."""
    html = "".join(samples_section(runs, {r.directory: pen(i) for i, r in enumerate(runs)}))
    parts = re.findall(r"<h3>(.*?)</h3>|<dl class=\"sample\">(.*?)</dl>", html, re.DOTALL)
    found = []
    for title, rows in parts:
        if title:
            found.append((title, []))
        else:
            found[-1][1].append(re.findall(
                r"<dt>(?:<span[^>]*></span>)?(.*?)</dt><dd>(.*?)</dd>", rows, re.DOTALL))
    return found


def test_no_run_with_texts_is_no_section(tmp_path):
    assert samples_section([run(tmp_path / "a"), run(tmp_path / "b")], {}) == []
    assert samples_section([run(tmp_path / "c", evaluation__x__predictions="")], {}) == []


def test_answers_to_the_same_inputs_are_side_by_side(tmp_path):
    inputs = "".join(f"in {i}\n" for i in range(9))
    answers = "".join(f"<b>{i}\n" for i in range(9))
    a = run(tmp_path / "a", evaluation__e2e_test__predictions=answers,
            evaluation__e2e_test__inputs=inputs,
            evaluation__e2e_test__reference0="".join(f"r {i}\n" for i in range(9)))
    b = run(tmp_path / "b", evaluation__e2e_test__predictions=answers.upper(),
            evaluation__e2e_test__inputs=inputs,
            evaluation__e2e_test__reference0="".join(f"r {i}\n" for i in range(9)))
    ((title, samples),) = shown(a, b)
    assert title == "e2e_test" and len(samples) == 4
    assert samples[0] == [("input 2", "in 1"), ("reference", "r 1"), ("a", "&lt;b&gt;1"),
                          ("b", "&lt;B&gt;1")]
    assert [rows[0][1] for rows in samples] == ["in 1", "in 3", "in 5", "in 7"]


def test_answers_to_other_inputs_stand_apart(tmp_path):
    a = run(tmp_path / "a", evaluation__t__predictions="x\ny\n", evaluation__t__inputs="1\n2\n")
    b = run(tmp_path / "b", evaluation__t__predictions="x\ny\n", evaluation__t__inputs="1\n3\n")
    c = run(tmp_path / "c", evaluation__t__predictions="x\n")
    assert [[rows[0][1] for rows in samples] for _, samples in shown(a, b, c)] == [
        ["1", "2"], ["1", "3"], ["not kept"]]


def test_inputs_and_references_that_are_not_as_many_as_answers_are_not_shown(tmp_path):
    a = run(tmp_path / "a", evaluation__t__predictions="x\ny\n", evaluation__t__inputs="1\n",
            evaluation__t__references="r\ns\n\nt\n\n")
    ((_, samples),) = shown(a)
    assert samples == [[("input 1", "not kept"), ("reference", "r"), ("a", "x")],
                       [("input 2", "not kept"), ("reference", "t"), ("a", "y")]]


def test_files_of_samples_are_shown_by_name_and_cut(tmp_path):
    a = run(tmp_path / "a", samples__imports="import os\n\x1b[2J\n", samples__long="x" * 900)
    b = run(tmp_path / "b", samples__imports="import sys\n")
    found = dict(shown(a, b))
    assert found["imports"] == [[("a", "import os\n\\x1b[2J"), ("b", "import sys")]]
    assert found["long"] == [[("a", "x" * LONGEST + " ...")]]


def test_a_file_that_is_no_text_is_shown_as_far_as_it_is(tmp_path):
    a = run(tmp_path / "a", samples__s="")
    (tmp_path / "a/samples/s.txt").write_bytes(b"\xef\xbb\xbfok \xff\n")
    assert shown(a) == [("s", [[("a", "ok \ufffd")]])]


def test_what_is_no_text_of_the_run_is_left_out_with_a_line(tmp_path):
    """A stranger's run directory shows nothing of what lies outside of it."""
    a = run(tmp_path / "a", samples__good="here", evaluation__t__predictions="x\n")
    (tmp_path / "secret").write_text("SECRET\n")
    for name in ("samples/link.txt", "evaluation/t/inputs.txt", "evaluation/t/reference0"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "secret")
    (tmp_path / "a/samples/own.txt").symlink_to("good.txt")
    (tmp_path / "a/samples/directory.txt").mkdir()
    os.mkfifo(tmp_path / "a/samples/pipe.txt")
    html = "".join(samples_section([a], {a.directory: pen(0)}))
    assert "SECRET" not in html and [title for title, _ in shown(a)] == ["t", "good", "own"]
    for sentence in ("link.txt is reached by a link", "inputs.txt is reached by a link",
                     "reference0 is reached", "directory.txt: no regular", "pipe.txt: no regular"):
        assert sentence in html


@pytest.mark.parametrize(("count", "numbers"), [
    (0, []), (1, [0]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (1000, [125, 375, 625, 875])])
def test_shown_inputs_are_spread(count, numbers):
    assert spread(count) == numbers
