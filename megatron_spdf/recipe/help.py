"""`--help`: every field of a recipe with type, default, unit and meaning, read off the typed
recipe."""

from __future__ import annotations

import textwrap
import types
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.section import OneOf, Section, SectionOf


def render_help(section: type[Section] = Recipe, prefix: str = "", width: int = 110,
                leave_out: type[BaseModel] = BaseModel) -> str:
    """One line a field, `section.key  type = default  meaning`, wrapped to `width` columns; without
    those that are the same in the section `leave_out`."""
    lines: list[str] = []
    for key, field in section.all_fields().items():
        if key in leave_out.model_fields and repr(field) == repr(leave_out.model_fields[key]):
            continue
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            lines += _render_sections(field, f"{prefix}{key}", width)
            continue
        default = "" if field.default is PydanticUndefined else f" = {_plain(field.default)}"
        names = ["|".join(mark.registry.names()) for mark in field.metadata
                 if isinstance(mark, OneOf)]
        kind = names[0] if names else _type_name(nested)
        head = f"  {prefix + key + ' ':<28}{kind}{default}  "
        lines.append(textwrap.fill(head + (field.description or ""), width,
                                   subsequent_indent=" " * 30))
    return "\n".join(lines)


def _render_sections(field: FieldInfo, place: str, width: int) -> list[str]:
    """The section that a field holds; where a name in it decides, those of all tenants, of the
    others only what is theirs."""
    by_name = next((mark for mark in field.metadata if isinstance(mark, SectionOf)), None)
    if by_name is None:
        return _render_section(field.annotation, place, width)
    (_, first), *others = by_name.sections().items()
    lines = _render_section(first, place, width)
    for name, section in others:
        lines += ["", f"{place}, {by_name.key}={name}:  {_first_line(section)}".rstrip(": "),
                  render_help(section, f"{place}.", width, leave_out=first)]
    return lines


def _render_section(section: type[BaseModel], place: str, width: int) -> list[str]:
    return ["", f"{place}:  {_first_line(section)}".rstrip(": "),
            render_help(section, f"{place}.", width)]


def _first_line(section: type[BaseModel]) -> str:
    text = section.__dict__.get("__doc__") or ""
    return text.strip().split("\n")[0]


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value)


def _type_name(annotation: object) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if origin in (types.UnionType, typing.Union):
        return "|".join(_type_name(a) for a in typing.get_args(annotation) if a is not type(None))
    if origin is list:
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return getattr(annotation, "__name__", str(annotation))
