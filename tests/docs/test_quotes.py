"""README.md and docs/extending.md quote the code that they show."""

from __future__ import annotations

import ast

import pytest
from pages import ALL, ROOT

QUOTED = [block for block in ALL if block.mark == "checked" and block.language == "python"]
FILES = {"Qwen2": "megatron_spdf/architecture/qwen.py", "Wander": "tests/seams/wander.py"}


def lines_of(source: str) -> list[str]:
    """Its lines without docstrings, comments, blanks and a final ellipsis, normalized."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = body[1:]
    lines = [line.strip() for line in ast.unparse(tree).splitlines()]
    return [line for line in lines if line not in ("", "...")]


@pytest.mark.parametrize("block", QUOTED, ids=str)
def test_a_quotation_is_in_its_file(block):
    (file,) = [path for name, path in FILES.items() if f"class {name}(" in block.text]
    rest = iter(lines_of((ROOT / file).read_text()))
    missing = [line for line in lines_of(block.text) if line not in rest]  # in their order
    assert not missing


def test_both_are_quoted():
    assert sorted(block.page for block in QUOTED) == ["README.md", *2 * ["docs/extending.md"]]
