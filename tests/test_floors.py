"""Invariant 10: imports point one way, from a floor to those below it, and have no circle.

Every import counts, those inside functions too. A module belongs to the longest name that a floor
lists; modules of one floor may use one another, as long as no circle comes of it.
"""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_spdf"
# From the ground up. What a module may import lies on its own floor or below. The package itself is
# the top: what `from megatron_spdf import` gives is imported when it is asked for.
FLOORS = [
    (
        "ground",
        ["version", "registry", "text", "files", "paths", "records", "locks", "command_line",
         "exit_codes", "processes", "random_streams", "section", "tables"],
    ),
    ("architecture", ["architecture"]),
    ("sparsity and kernels", ["sparsity", "kernels"]),
    ("optimizers", ["optimizers"]),
    ("recipe", ["recipe"]),
    ("planning", ["schedule", "planning", "scaling_law"]),
    ("layers", ["layers"]),
    ("model building", ["model"]),
    ("parallel and resilience", ["parallel", "resilience"]),
    ("engine", ["engine"]),
    ("data", ["data"]),
    ("checkpoint", ["checkpoint"]),
    ("conversion and evaluation", ["convert", "evaluation"]),
    ("training and runs", ["training", "runs"]),
    ("reports", ["reports"]),
    ("package", ["__init__"]),
]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name without the package's, "__init__" for the package itself -> file."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        inner = parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts
        found[".".join(inner)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE:
                inside = name.partition(".")[2]
                room = inside.rpartition(".")[0] or "__init__"
                yield inside if inside in known else room, node.lineno


def floor_of(module: str) -> int:
    """Index into FLOORS of the longest listed name that the module is, or lies in."""
    listed = {name: number for number, (_, names) in enumerate(FLOORS) for name in names}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in listed:
            return listed[name]
    raise AssertionError(f"{PACKAGE}.{module} is on no floor; list its room in "
                         f"{Path(__file__).name}")


def arrows_up(root: Path) -> list[str]:
    """One sentence for every import of something on a higher floor."""
    known, broken = modules(root), []
    for module, path in known.items():
        own = floor_of(module)
        for target, line in imports(path, known):
            if (other := floor_of(target)) > own:
                broken.append(
                    f"{path.relative_to(root)}:{line} imports {PACKAGE}.{target}: {FLOORS[own][0]} "
                    f"lies below {FLOORS[other][0]}. Move the importing code up to "
                    f"{FLOORS[other][0]}, or what it needs down to {FLOORS[own][0]}")
    return broken


def circles(root: Path) -> list[str]:
    """Rooms and modules that import one another, directly or through others."""
    known = modules(root)
    by_module = {m: {t for t, _ in imports(p, known) if t != m} for m, p in known.items()}
    by_room: dict[str, set[str]] = {}
    for module, targets in by_module.items():
        room = module.split(".")[0]
        by_room.setdefault(room, set()).update(t.split(".")[0] for t in targets)
    for room in by_room:
        by_room[room] -= {room}
    return [*_circles(by_module), *_circles(by_room)]


def _circles(graph: dict[str, set[str]]) -> Iterator[str]:
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> Iterator[str]:
        if node in way:
            yield " -> ".join([*way[way.index(node):], node])
        elif node not in done:
            for target in sorted(graph.get(node, ())):
                yield from visit(target, [*way, node])
            done.add(node)

    for node in sorted(graph):
        yield from visit(node, [])


def test_imports_point_down():
    assert not (broken := arrows_up(ROOT)), "\n".join(broken)


def test_imports_have_no_circle():
    assert not (found := circles(ROOT)), "\n".join(found)


@pytest.mark.parametrize("code", ["from megatron_spdf.engine import base",
                                  "def late():\n    import megatron_spdf.engine.base"])
def test_an_import_that_is_turned_round_is_found(tmp_path, code):
    for name, text in {"layers/low.py": code, "engine/base.py": "", "__init__.py": ""}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (sentence,) = arrows_up(tmp_path)
    assert "layers/low.py" in sentence and "engine lies" not in sentence
    assert "layers lies below engine" in sentence and "Move" in sentence


def test_a_circle_is_found(tmp_path):
    for name, text in {"layers/a.py": "from megatron_spdf.layers import b",
                       "layers/b.py": "from megatron_spdf.layers import a"}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert circles(tmp_path) == ["layers.a -> layers.b -> layers.a"]


def test_files_of_tests_have_names_of_their_own():
    """Two of one name are not collected in one run of pytest, and in runs of one room they are."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
