"""Every constant of the package that is a number has the figure that docs/limits.md gives; that of
the looks of a report may be missing there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_spdf"
ROW = re.compile(r"^\| ([-\d.,e]+)(?: (KiB|MiB|GiB|s))? \| .* \| `([\w/.]+)` `([\w.]+)` \|$",
                 re.M)
TIMES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def numbers(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, float]]:
    """Names in capitals of a module and of its classes, and the numbers they are given."""
    for part in body:
        if isinstance(part, ast.ClassDef):
            yield from numbers(part.body, f"{part.name}.")
        if not isinstance(part, ast.Assign | ast.AnnAssign) or part.value is None:
            continue
        target = part.targets[0] if isinstance(part, ast.Assign) else part.target
        pairs = (zip(target.elts, part.value.elts, strict=True)
                 if isinstance(target, ast.Tuple) and isinstance(part.value, ast.Tuple)
                 else [(target, part.value)])
        for name, value in pairs:
            if isinstance(name, ast.Name) and name.id.isupper() and _is_number(value):
                text = compile(ast.Expression(value), name.id, "eval")
                yield within + name.id, eval(text, {"__builtins__": {"len": len}})


def _is_number(value: ast.expr) -> bool:
    """Whether it is arithmetic with nothing but numbers and lengths of texts in it."""
    if isinstance(value, ast.BinOp):
        return _is_number(value.left) and _is_number(value.right)
    if isinstance(value, ast.UnaryOp):
        return _is_number(value.operand)
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "len" and isinstance(
            value.args[0], ast.Constant)
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


def test_constants_are_those_of_the_page():
    found = {(str(path.relative_to(PACKAGE)), name): value
             for path in sorted(PACKAGE.rglob("*.py"))
             for name, value in numbers(ast.parse(path.read_text()).body)}
    rows = ROW.findall((ROOT / "docs/limits.md").read_text())
    said = {(file, name): (float if {".", "e"} & set(figure) else int)(figure.replace(",", ""))
            * TIMES.get(unit, 1) for figure, unit, file, name in rows}
    assert len(said) == len(rows) > 150
    missing = {key for key in found.keys() - said.keys() if not key[0].startswith("reports/")}
    assert not missing, "docs/limits.md must have them"
    assert said.keys() - found.keys() == set(), "docs/limits.md has them, and the code has not"
    assert {key: (found[key], said[key]) for key in said if found[key] != said[key]} == {}
