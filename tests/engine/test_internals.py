"""What the package uses of its engines' internals is there, and the table of it is whole."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_spdf.engine import internals
from megatron_spdf.engine.internals import INTERNALS, Internal, missing_of

ROOT = Path(internals.__file__).parents[1]
ENGINES = {"torch", "megatron", "deepspeed"}
STANDARD = {"_replace", "_exit"}  # private in form only: namedtuple's, os'


@pytest.mark.slow
def test_all_of_it_is_there():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", internals.__name__],
                          cwd=ROOT.parent, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("owner, parts, lacks", [
    ("json", (), []),
    ("json", ("loads", "gone|dumps"), []),
    ("json", ("loads", "gone|lost"), ["json: gone|lost"]),
    ("http.client.HTTPConnection", ("sock", "request", "gone"),  # the first is of instances only
     ["http.client.HTTPConnection: gone"]),
    ("json.loads", ("parse_int", "Deserialize"), ["json.loads: Deserialize"]),  # of its docstring
    ("os.getpid", ("gone",), ["os.getpid: gone"]),
    ("json.gone", (), ["json.gone (module 'json' has no attribute 'gone')"]),
    ("gone.module", (), ["gone.module (No module named 'gone')"]),
])
def test_what_is_missing_is_named(owner, parts, lacks):
    assert missing_of(Internal(owner, parts, "")) == lacks


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: internal.owner)
def test_what_the_table_has_is_used(internal):
    text = "\n".join(file.read_text() for file in modules())
    for part in internal.parts or (internal.owner.rpartition(".")[2],):
        assert any(re.search(rf"\b{name}\b", text) for name in part.split("|")), part


@pytest.mark.slow
def test_private_names_that_are_used_are_in_the_table():
    known = set.union(*(internal.names for internal in INTERNALS)) | STANDARD
    unknown = {f"{file.relative_to(ROOT.parent)}:{line} {name}" for file in modules()
               for line, name in foreign_names(ast.parse(file.read_text())) if name not in known}
    assert not unknown


@pytest.mark.parametrize("code, names", [
    ("from torch._a.b import C", ["C"]),
    ("import torch._a.b", ["b"]),
    ("from megatron.core.b import _c as c", ["_c"]),
    ("from deepspeed.b import c", []),
    ("from json._a import b", []),
    ("self._there_is_none()", ["_there_is_none"]),
    ("optimizer.groups._there_is_none", ["_there_is_none"]),
    ("self._saving, self.__dict__", []),  # the package's own
    ("import torch as t\nt.cuda.sync = None", ["sync"]),
    ("model.cuda = None", []),
])
def test_private_names_are_found(code, names):
    assert [name for _, name in foreign_names(ast.parse(code))] == names


@cache
def modules() -> tuple[Path, ...]:
    """The package's own and the benchmarks', without the table."""
    files = [*ROOT.rglob("*.py"), *(ROOT.parent / "tools" / "benchmarks").rglob("*.py")]
    return tuple(f for f in sorted(files) if f.name != "internals.py")


@cache
def own_names() -> frozenset[str]:
    """The private names that the package defines."""
    found = set()
    for node in (n for file in modules() for n in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif is_target(node) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found.add(node.attr)
    return frozenset(found)


def foreign_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and names of what is private in an engine, or replaced there."""
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = getattr(node, "module", None)
            for name in node.names:
                whole = f"{origin}.{name.name}" if origin else name.name
                if whole.partition(".")[0] in ENGINES:
                    aliases.add((name.asname or name.name).partition(".")[0])
                    if any(part.startswith("_") for part in whole.split(".")):
                        yield node.lineno, whole.rpartition(".")[2]
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Attribute)):
        private = re.match("_[^_]", node.attr) and node.attr not in own_names()
        if private or is_target(node) and root_of(node) in aliases:
            yield node.lineno, node.attr


def is_target(node: ast.AST) -> bool:
    """Whether an attribute is assigned."""
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def root_of(node: ast.expr) -> str | None:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None
