"""Pages name files and tests that exist.

CONTRIBUTING.md names all rooms, floors, and tests of invariants. docs/trust.md names a test of each
sentence.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_floors import FLOORS, PACKAGE

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = ["CONTRIBUTING.md", "tests/README.md", "docker/README.md",
         *(str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/*.md")))]
PATH = re.compile(r"`((?:megatron_spdf|tests|tools|launch|docs|docker)/[\w./]*\w)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PROMISES = (ROOT / "docs/trust.md").read_text()
MADE_BY_USERS = {"launch/site.sh"}


def mapped() -> set[str]:
    """Paths of the code map, whose indentation nests them."""
    tree = PAGE.split("## Code map\n")[1].split("```\n")[1].rstrip()
    above, found = [], set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [line.split()[0]]
        found.add("".join(above))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    named = set(PATH.findall((ROOT / page).read_text())) - MADE_BY_USERS
    assert not (missing := sorted(name for name in named if not (ROOT / name).exists())), missing


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_pages_name_exist(page):
    for path, name in TEST.findall((ROOT / page).read_text()):
        tree = ast.parse((ROOT / path).read_text())
        assert name in {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}, path


def test_every_sentence_about_trust_has_a_test():
    rows = [row for row in re.findall(r"^\| (.*) \| (.*) \|$", PROMISES, re.M)
            if row[0] != "sentence"]
    assert rows and all(TEST.search(tests) for _, tests in rows), rows


def test_the_code_map_has_every_room():
    there = {str(path.parent.relative_to(ROOT)) + "/"
             for path in (ROOT / PACKAGE).rglob("__init__.py")}
    found = mapped()
    assert all((ROOT / path).exists() for path in found)
    assert there <= found


def test_floors_are_those_of_the_imports():
    rows = re.findall(r"^\| ([a-z ]+) \| (.*) \|$", PAGE.split("| floor,")[1], re.M)
    floors = {name: re.findall(r"`(\w+)`", rooms) for name, rooms in rows}
    assert list(floors.items())[1:] == [(name, rooms) for name, rooms in FLOORS[1:]]


def test_every_invariant_is_named_by_its_tests():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", PAGE, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for number, tests in rows:
        paths = PATH.findall(tests)
        assert paths, number
        for path in paths:
            said = ast.get_docstring(ast.parse((ROOT / path).read_text())).split("\n\n")[0]
            named = re.search(r"Invariants? ([\d, and]+)", said)
            assert named and number in re.findall(r"\d+", named[1]), (path, number)
