"""Truth values are no numbers, wherever a recipe wants one, and an empty path is none."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.section import Section, _is_number, _kinds


def numbers(kind: type[Section], place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Keys of all fields of a recipe that are numbers and no truth values."""
    found = []
    for name, field in kind.model_fields.items():
        if _is_number(field.annotation):
            found.append((*place, name))
        for inner in set(_kinds(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                found += numbers(inner, (*place, name))
    return found


@pytest.mark.parametrize("kind", [Recipe, Finetune])
def test_true_is_no_number_in_any_field(kind):
    keys = numbers(kind)
    assert len(keys) > 20 and ("seed",) in keys and ("train", "global_batch") in keys
    for key in keys:
        values: object = True
        for name in reversed(key):
            values = {name: values}
        with pytest.raises(ValidationError) as refused:
            kind.model_validate(values)
        own = [e for e in refused.value.errors() if e["loc"][: len(key)] == key]
        assert own and own[0]["msg"] == "input should be a number, and true is none", key


def test_flags_are_flags(recipe):
    assert recipe(parallel={"overlap": False}, data={"reset_attention": True}).data.reset_attention


@pytest.mark.parametrize("sections", [{"output": ""}, {"data": {"train": [""]}},
                                      {"data": {"tokenizer": ""}}], ids=str)
def test_an_empty_path_is_refused(recipe, sections):
    with pytest.raises(ValueError, match="a path is empty; name a file or directory"):
        recipe(**sections)


def test_a_section_holds_its_own_defaults_to_their_bounds_and_stays_as_it_is():
    class Tenant(Section):
        number: float = Field(0.0, gt=0.0)

    with pytest.raises(ValidationError, match="greater than 0"):
        Tenant()
    with pytest.raises(ValidationError, match="finite number"):
        Tenant(number=float("inf"))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Tenant(number=1.0, other=2.0)
    made = Tenant(number=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        made.number = 2.0
    assert hash(made) == hash(Tenant(number=1.0))
