"""--help: every field of a recipe with its meaning."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.recipe import Recipe


def fields(section: type[BaseModel] = Recipe, place: str = ""):
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{place}{key}.")
        else:
            yield f"{place}{key}", field


FIELDS = dict(fields())


def lines_of(name: str) -> str:
    """The entry of a field, wrapping undone."""
    entries = render_help().replace("\n" + " " * 30, " ").split("\n")
    found = [entry for entry in entries if entry.split()[:1] == [name]]
    assert len(found) == 1, (name, found)
    return " ".join(found[0].split())


@pytest.mark.parametrize("name", FIELDS)
def test_field_is_in_the_help_with_its_meaning(name):
    assert FIELDS[name].description
    assert lines_of(name).endswith(" ".join(FIELDS[name].description.split()))


@pytest.mark.parametrize("name, text", [
    ("optimizer.lr", "float"), ("optimizer.beta2", "float = 0.999"),
    ("log.tensorboard", "bool = true"), ("data.index_cache", "str = none"),
    ("train.precision", "bf16|fp32 = bf16"), ("data.train", "list of str = []"),
    ("sparsity.rules", "list of {weights, level}")])
def test_help_shows_type_and_default(name, text):
    assert text in lines_of(name)


def test_lines_fit_a_terminal():
    assert max(map(len, render_help().split("\n"))) <= 110
