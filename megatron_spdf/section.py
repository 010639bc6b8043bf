"""The base of a recipe's sections, and the forms that their values may be written in."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

MULTIPLES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(value: Any) -> Any:
    """`26B`, `375M`, `2.5e9` or 5_000 -> int; what cannot be read is passed on for pydantic to
    refuse."""
    if isinstance(value, str) and value:
        text, factor = value.replace("_", "").strip().lower(), 1
        if text[-1:] in MULTIPLES:
            text, factor = text[:-1], MULTIPLES[text[-1]]
        try:
            value = float(text) * factor
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(parse_count)]


Paths = Annotated[list[str], BeforeValidator(as_list)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True,
                              allow_inf_nan=False)
