"""make test-one: which files it looks into, and what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import one
import pytest

ROOT = Path(__file__).resolve().parents[1]


def names(expression: str) -> set[str]:
    return {Path(path).name for path in one.files_with(expression)}


def test_files_in_which_a_word_occurs_are_looked_into():
    assert "test_tables.py" in names("test_tables")
    assert "test_one_thing.py" in names("an_odd_word_of_this_test and tp2")
    assert "test_one_thing.py" in names("AN_ODD_WORD_OF_THIS_TEST")
    assert names("no_file_has_" + "this") == set()


def test_words_that_are_negated_choose_no_file():
    assert names("test_tables and not test_blend") == names("test_tables")
    assert names("not test_blend") == names("not (test_blend)") - names("test_blend") == set()


@pytest.mark.parametrize("path", ["tests/test_tables.py", "tests/test_tables.py::test_text"])
def test_a_path_is_taken_as_it_is(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert one.arguments_for(path) == [[path]]


def test_where_no_file_has_a_word_all_are_looked_through(monkeypatch):
    tried = []
    monkeypatch.setattr(one.pytest, "main", lambda words: tried.append(words[-3:]) or
                        pytest.ExitCode.NO_TESTS_COLLECTED)
    assert one.main(["no_file_has_" + "this"]) == pytest.ExitCode.NO_TESTS_COLLECTED
    assert tried == [["tests", "-k", "no_file_has_" + "this"]]


@pytest.mark.parametrize("words", [[], [""], [" "]])
def test_without_a_word_it_says_what_to_write(words, capsys):
    assert one.main(words) == 2
    assert "make test-one K=test_blend" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_the_tests_and_names_each():
    done = subprocess.run([sys.executable, "-W", "ignore", "tests/one.py", "test_registry"],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout
    assert "tests/test_registry.py::" in done.stdout and " PASSED" in done.stdout
