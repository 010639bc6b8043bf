"""Every key of every kind of recipe is given what it was not made for: it is refused by name before
anything starts, or it means what was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_spdf.recipe.finetune import Finetune, _finetune_violations
from megatron_spdf.recipe.load import make_recipe, read_value
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.section import parse_count
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS
from megatron_spdf.sparsity.plan import Plan

# as words of a command line have them
ODD = ["", "~", "''", "x", "nan", ".nan", ".inf", "-.inf", "1e400", "1e308", "-1", "0", "1e-40",
       "0.5", "1", "3", "true", "9223372036854775808", "9" * 40, "[]", "[[]]", "[x]", "[.nan]",
       "[1, 1]", "{}", "{a: 1}", "{a: 1, a: 2}", "12:30:45", "2001-01-01", "!!binary aGk=",
       '"a\\nb"']
SIZES = {"layers": 4, "hidden": 64, "heads": 4, "vocab_size": 256, "max_positions": 32}
PRETRAIN = {"output": "run", "model": SIZES, "optimizer": {"lr": 1e-3},
            "train": {"tokens": 256_000, "global_batch": 8, "micro_batch": 2}}
FINETUNE = {"output": "run", "checkpoint": "there", "data": {"task": "e2e", "path": "x"},
            "train": {"global_batch": 8, "micro_batch": 4}, "optimizer": {"lr": 1e-4}}
GROUPED = {**SIZES, "query_groups": 2, "ffn_hidden": 96}
# what else decides which keys there are; those of its own sections are tried
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "static": ({"sparsity": {"level": 0.5}}, ()),
    "tiles": ({"sparsity": {"level": 0.75, "pattern": "tile", "tile": 4}}, ("sparsity",)),
    "n:m": ({"sparsity": {"level": 0.5, "pattern": "n_m"}}, ("sparsity",)),
    "a rule": ({"sparsity": {"level": 0.5, "rules": [{"weights": "*.linear_qkv.weight",
                                                      "level": 0.25}]}}, ("sparsity.rules",)),
    "stages": ({"stages": [{"share": 0.5, "sparsity": {"level": 0.5}},
                           {"share": 0.5, "sparsity": {"level": 0.0}}]}, ("stages",)),
    "a blend": ({"data": {"blend": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}]}},
                ("data.blend",)),
    "mup": ({"parametrization": "mup", "mup_base": {"hidden": 32}},
            ("mup_base", "parametrization")),
    **{name: ({"model": {**GROUPED, "architecture": name}}, ("model",))
       for name in ("llama", "qwen3")},
    **{name: ({"sparsity": {"level": 0.75, "algorithm": name}}, ("sparsity.update",))
       for name in ALGORITHMS.names() if name != "static"},
}


def keys(values: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Places of all values, sections and entries of lists among them."""
    for key, value in (values.items() if isinstance(values, dict) else
                       enumerate(values) if isinstance(values, list) else ()):
        yield (*place, key)
        yield from keys(value, (*place, key))


def changed(values: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """A copy of nested values with another one at a place."""
    if not place:
        return value
    copy = list(values) if isinstance(values, list) else dict(values or {})
    copy[place[0]] = changed(copy[place[0]] if isinstance(values, list) else copy.get(place[0]),
                             place[1:], value)
    return copy


def at(values: Any, place: tuple[str | int, ...]) -> Any:
    for key in place:
        values = values[key]
    return values


def try_every_value(make, values: dict[str, Any], places: list[tuple[str | int, ...]],
                    use=lambda recipe: None) -> int:
    """Returns how many were refused."""
    refused = 0
    for place in places:
        for text in ODD:
            try:
                value = read_value(text)
            except ValueError:  # the reader refuses it under any key
                refused += 1
                continue
            try:
                recipe = make(changed(values, place, value))
                use(recipe)
            except ValueError as error:  # and nothing else
                refused += 1
                named = [part for part in place if isinstance(part, str)]
                assert any(part in str(error) for part in named[-2:]), (place, text, error)
                continue
            require_meant(recipe.model_dump(), place, value, text)
    return refused


def require_meant(dumped: dict[str, Any], place: tuple[str | int, ...], value: Any,
                  text: str) -> None:
    """That what was accepted is a value that one can mean, and the one that was given."""
    for inner in keys(dumped):
        found = at(dumped, inner)
        assert not isinstance(found, float) or not found or 1e-38 < abs(found) < 3e38, (place, text)
        assert not isinstance(found, int) or abs(found) < 2**63, (place, text)
    found = at(dumped, place)
    if isinstance(found, int | float) and not isinstance(found, bool):
        assert found == parse_count(value) or value is None, (place, text, found)
    elif isinstance(found, bool):
        assert found == value or value is None, (place, text, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_any_value_of_any_key_of_pre_training(name):
    more, only = KINDS[name]
    values = {**PRETRAIN, **more}
    full = make_recipe(values, [], "it").model_dump()
    places = [place for place in keys(full) if not only or any(
        f"{'.'.join(map(str, place))}.".startswith(f"{start}.") for start in only)]
    deep = name not in ("static", "a blend")

    def use(recipe: Recipe) -> None:
        if deep:
            Plan.of(recipe)
            stages_of(recipe)

    refused = try_every_value(lambda odd: make_recipe(odd, [], "it"), values, places, use)
    assert refused > len(places) * len(ODD) / 3


@pytest.mark.slow
def test_any_value_of_any_key_of_fine_tuning():
    def make(values: dict[str, Any]) -> Finetune:
        return make_recipe(values, [], "it", 1, Finetune, _finetune_violations)

    places = list(keys(make(FINETUNE).model_dump()))
    assert try_every_value(make, FINETUNE, places) > len(places) * len(ODD) / 3


def test_no_rule_is_broken_by_what_they_start_from():
    for more, _ in KINDS.values():
        assert not list(rule_violations(make_recipe({**PRETRAIN, **more}, [], "it")))


@pytest.mark.parametrize("longest", ["x", "0", "-1", "1e30", "0.5", "true"])
def test_a_wrong_length_is_said_of_the_key_that_has_it(longest):
    with pytest.raises(ValueError) as refused:
        make_recipe(PRETRAIN, [f"model.max_positions={longest}"], "it")
    (said,) = str(refused.value).splitlines()[1:]
    assert said.startswith("  - model.max_positions=")


def test_a_key_without_a_value_has_its_default():
    assert make_recipe(PRETRAIN, ["model.max_positions="], "it").train.sequence_length == 2048
