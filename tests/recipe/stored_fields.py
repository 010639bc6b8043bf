"""Every field of a recipe and of a fine-tuning recipe with its default and bounds.

`python tests/recipe/stored_fields.py` stores them in stored_fields.txt anew, which is right after a
change that means to change a default or a bound.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from pydantic import BaseModel  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402

from megatron_spdf.recipe.finetune import Finetune  # noqa: E402
from megatron_spdf.recipe.recipe import BlendSource, Recipe, Stage  # noqa: E402
from megatron_spdf.section import Section, SectionOf  # noqa: E402
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS  # noqa: E402
from megatron_spdf.sparsity.patterns.base import PATTERNS  # noqa: E402
from megatron_spdf.sparsity.settings import SparsityRule  # noqa: E402

STORED = HERE / "stored_fields.txt"
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def lines() -> list[str]:
    """One line a field: place, default, bounds."""
    found = [*_section(Recipe, "pretrain"), *_section(Finetune, "finetune"),
             *_section(Stage, "stage"), *_section(SparsityRule, "rule"),
             *_section(BlendSource, "source")]
    for registry in (ALGORITHMS, PATTERNS):
        for name in registry.names():
            if registry.get(name).__module__.startswith("megatron_spdf."):
                found += _section(registry.get(name), f"sparsity {name}")
    return found


def _section(section: type[BaseModel], place: str) -> Iterator[str]:
    for key, field in section.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, SectionOf)]
        if marks:
            for name, one in marks[0].sections().items():
                if not name or one.__module__.startswith("megatron_spdf."):
                    yield from _section(one, f"{place}.{key} {name}".rstrip())
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _section(field.annotation, f"{place}.{key}")
        else:
            yield f"{place}.{key}{_default(field)}{_bounds(field)}"


def _default(field: FieldInfo) -> str:
    return "" if field.default is PydanticUndefined else f" = {field.default!r}"


def _bounds(field: FieldInfo) -> str:
    return "".join(f", {word} {getattr(mark, key)!r}" for mark in field.metadata
                   for key, word in BOUNDS.items() if hasattr(mark, key))


if __name__ == "__main__":
    STORED.write_text("\n".join(lines()) + "\n")
