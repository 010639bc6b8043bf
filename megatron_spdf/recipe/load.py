"""From a YAML file and `section.key=value` words to a validated recipe."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_spdf.files import write_file
from megatron_spdf.paths import expand_home, real
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.records.limits import MOST_NESTING
from megatron_spdf.records.values import rule_of, shown
from megatron_spdf.records.yaml_reader import parse_yaml, read_yaml
from megatron_spdf.section import ByName, SectionOf
from megatron_spdf.sparsity.settings import normalize_sparsity

R = TypeVar("R", bound=BaseModel)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), world: int = 1,
                kind: type[R] = Recipe,
                rules: Callable[[R], Iterable[str]] = rule_violations) -> R:
    """Reads a recipe, applies overrides, validates every field and every rule between fields.

    Args:
        path: YAML file; its `extends:` names another one, relative to it, whose values it changes.
        overrides: words such as `parallel.tensor=2` or `sparsity=0.5`; values are YAML.
        world: number of processes, from which `parallel.data=auto` follows.
        kind: of recipe.
        rules: between the fields of that kind.

    Raises:
        ValueError: naming each wrong key or value, the rule it breaks and the remedy.
    """
    return make_recipe(recipe_values(path, kind), overrides, path, world, kind, rules)


def recipe_values(path: str | Path, kind: type[BaseModel] = Recipe) -> dict[str, Any]:
    """What a recipe and those that it extends say, before it is checked.

    Raises:
        ValueError: one is missing, or is no mapping of sections.
    """
    return _read(kind, Path(path), ())


def make_recipe(values: dict[str, Any], overrides: Sequence[str], path: str | Path, world: int = 1,
                kind: type[R] = Recipe,
                rules: Callable[[R], Iterable[str]] = rule_violations) -> R:
    """Makes a recipe of values, as `load_recipe` does of a file; messages name `path`."""
    values = dict(values)
    for word in overrides:
        _override(kind, values, word)
    _fill_data_parallel(values, world)
    try:
        recipe = kind.model_validate(values)
    except ValidationError as error:
        broken = [sentence(e, kind, values) for e in error.errors()]
    else:
        broken = list(rules(recipe))
    if broken:
        raise ValueError(f"recipe {path}:\n" + "\n".join(f"  - {s}" for s in broken))
    return recipe


def save_recipe(recipe: BaseModel, path: str | Path) -> None:
    """Writes the recipe with every default filled in."""
    write_file(Path(path), render_recipe(recipe))


def render_recipe(recipe: BaseModel) -> str:
    """The recipe with every default filled in, as YAML."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def _read(kind: type[BaseModel], path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = real(expand_home(str(path)))
    if path in seen:
        raise ValueError(f"recipe {path} extends itself through "
                         f"{' -> '.join(p.name for p in seen)}; break the circle")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml"))  # none in no directory
        raise ValueError(f"there is no recipe {path}; {path.parent} holds "
                         f"{', '.join(near) or 'no .yaml file'}")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must be a mapping of sections, not a "
                         f"{type(values).__name__}")
    base = values.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"recipe {path}: extends={base!r} must name one file; write for example "
                         "extends: base.yaml")
    if base is None:
        return values
    return _merge(_read(kind, path.parent / expand_home(base), (*seen, path)), values, kind)


def _merge(base: dict[str, Any], change: dict[str, Any],
           kind: type[BaseModel] | None) -> dict[str, Any]:
    """`change` over `base`, section by section; `kind` is the section that they are values of."""
    merged = dict(base)
    for key, value in change.items():
        field = kind.model_fields.get(key) if kind else None
        if key == "sparsity":
            merged[key], value = normalize_sparsity(merged.get(key, {})), normalize_sparsity(value)
        before = merged.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            old, new = _section(field, before), _section(field, before | value)
            merged[key] = _merge(_without_fields_of(old, new, before), value, new)
        else:
            merged[key] = value
    return merged


def _without_fields_of(old: type[BaseModel] | None, new: type[BaseModel] | None,
                       values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section less those that another tenant was meant by."""
    if old is None or new is None:
        return values
    foreign = old.model_fields.keys() - new.model_fields.keys()
    return {key: value for key, value in values.items() if key not in foreign}


def _section(field: FieldInfo | None, values: Any) -> type[BaseModel] | None:
    """The class of the section that a field holds, for these values; None: it holds none."""
    for mark in field.metadata if field else ():
        if isinstance(mark, SectionOf):
            try:
                return mark.section(values)
            except ValueError:
                return None  # validation says what is wrong with its name
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _override(kind: type[BaseModel], values: dict[str, Any], word: str) -> None:
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise ValueError(f"{word!r} is not section.key=value; write for example parallel.tensor=2")
    if name.count(".") >= MOST_NESTING:
        raise ValueError(f"{name!r:.80} has over {MOST_NESTING} parts; a key has a few")
    literal = _is_literal(_field_at(kind, values, name.split(".")), text)
    change: Any = text if literal else read_value(text, f"the value of {word!r:.80}")
    for key in reversed(name.split(".")):
        change = {key: change}
    merged = _merge(values, change, kind)
    values.clear()
    values.update(merged)


def read_value(text: str, name: str = "the text") -> Any:
    """The value that the text of an override means.

    The text is YAML without comments: a plain text stands for itself to its last character, `#`,
    blanks and colons included.

    Args:
        name: of the text, for the message.

    Raises:
        ValueError: it is no YAML, or something follows the value.
    """
    value = parse_yaml(text, name=name)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    rest = text[root.end_mark.index:].strip() if root else text.strip()
    plain = root is None or (isinstance(root, yaml.ScalarNode) and root.style is None)
    if plain and not text.startswith("!") and (isinstance(value, str) or rest):
        return text
    if rest:
        raise ValueError(f"{name} ends before {rest!r:.80}; write all of it in quotes")
    return value


def write_value(value: Any) -> str:
    """The shortest text that `read_value` reads as this value, and fields of text too."""
    if isinstance(value, str) and value == value.strip() and value[:1] not in "'\"":
        try:
            if read_value(value) == value:
                return value
        except ValueError:
            pass
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"),
                          allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def _field_at(kind: type[BaseModel] | None, values: Any, names: Sequence[str]) -> FieldInfo | None:
    """The field of a key in these values; None: no section has it."""
    field = None
    for name in names:
        field = kind.model_fields.get(name) if kind else None
        values = values.get(name) if isinstance(values, dict) else None
        kind = _section(field, values)
    return field


def _is_literal(field: FieldInfo | None, text: str) -> bool:
    """True if a text is the value as it stands, as it is for a field of text. Quotes around it and
    nothing mean what they mean in YAML."""
    if field is None or field.annotation not in (str, str | None):
        return False
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    nothing = text.strip() in ("", "~") or text.strip().lower() == "null"
    return not quoted and not (nothing and (field.annotation is not str or not text.strip()))


def _fill_data_parallel(values: dict[str, Any], world: int) -> None:
    """Replaces `parallel.data=auto` by the degree that makes the layout as large as the world."""
    parallel = values.get("parallel")
    if not isinstance(parallel, dict) or parallel.get("data") != "auto":
        return
    tensor, pipeline = parallel.get("tensor", 1), parallel.get("pipeline", 1)
    if not (isinstance(tensor, int) and isinstance(pipeline, int) and tensor > 0 and pipeline > 0):
        data = 1  # validation says what is wrong with them
    elif world % (tensor * pipeline):
        raise ValueError(f"parallel.data=auto: {world} processes do not make up whole replicas of "
                         f"parallel.tensor x pipeline = {tensor} x {pipeline} = "
                         f"{tensor * pipeline}; start a multiple of that (--nodes, "
                         "--ntasks-per-node) or change the two")
    else:
        data = world // (tensor * pipeline)
    values["parallel"] = {**parallel, "data": data}


def sentence(error: dict[str, Any], kind: type[BaseModel], values: dict[str, Any]) -> str:
    """One of pydantic's errors with the key, the value, the rule and the known keys.

    Args:
        kind: of the section that was to be read.
        values: that it was to be read from.
    """
    place = [p for p in error["loc"] if isinstance(p, (str, int))]
    name = ".".join(map(str, place))
    if error["type"] == "extra_forbidden":
        return f"unknown key {name} (value {error['input']!r}); {_right_key(place, kind, values)}"
    if error["type"] == "missing":
        way = "" if any(isinstance(p, int) for p in place) else f" or as {name}=VALUE"
        return f"{name} is missing; set it in the recipe{way} (see --help)"
    return f"{name}={shown(error['input'])}: {rule_of(error)}"


def _right_key(place: list[str | int], kind: type[BaseModel], values: Any) -> str:
    """What to write in place of a key that the section has not: the tenants that have it, the
    nearest known key, or the known ones."""
    *outer, key = place
    field: Any = None
    section: Any = kind
    for name in outer:
        if isinstance(name, int):
            field, section = None, typing.get_args(section)[0]
        else:
            field = section.model_fields[name]
            section = _section(field, _value(values, name)) or field.annotation
        values = _value(values, name)
    where, known = ".".join(map(str, outer)), sorted(section.all_fields())
    for mark in field.metadata if field else ():
        if isinstance(mark, ByName) and (names := _tenants_with(str(key), mark)):
            return (f"{where}.{mark.key}={_value(values, mark.key) or mark.default} has no such "
                    f"key, and {', '.join(names)} {'have' if len(names) > 1 else 'has'}; leave it "
                    "out or change one")
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return (f"did you mean {'.'.join([*map(str, outer), near[0]])}?" if near
            else f"known: {', '.join(known)}")


def _tenants_with(key: str, mark: ByName) -> list[str]:
    """Names of a seam's tenants whose section has a key."""
    return [name for name, section in mark.sections().items() if key in section.model_fields]


def _value(values: Any, key: str | int) -> Any:
    try:
        return values[key]
    except (TypeError, KeyError, IndexError):
        return None
