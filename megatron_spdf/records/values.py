"""Files of bounded size, the types of what was read, and faults with their place."""

from __future__ import annotations

import codecs
import functools
import json
import os
import stat
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")


class Unreadable(ValueError):
    """Raised if a file or a text cannot be read as what it should be."""


def read_bytes(path: str | Path, most: int, remedy: str = "") -> bytes:
    """Reads a regular file of at most so many bytes.

    Raises:
        Unreadable: it is none, or larger.
        OSError: it cannot be opened.
    """
    with open_regular(Path(path), remedy) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise unreadable(str(path), remedy, 0, f"over {most:,} bytes long")
    return content


def open_regular(path: Path, remedy: str) -> BinaryIO:
    """Opens a regular file for reading, and nothing else that a path may lead to."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not hang
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise unreadable(str(path), remedy, 0, "no regular file")
    return open(handle, "rb")


def decoded(text: str | bytes, name: str, remedy: str) -> str:
    """UTF-8 as text, without a byte-order mark."""
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise unreadable(name, remedy, text.count(b"\n", 0, error.start) + 1,
                         f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def unreadable(name: str, remedy: str, line: int, rule: str) -> Unreadable:
    """Error with the place, which a line of 0 leaves out, the rule and the remedy."""
    place = f"{name}, line {line}" if line else name
    return Unreadable(f"{place}: {rule}{'; ' if remedy else ''}{remedy}")


def typed(value: Any, kind: type[T], place: str, remedy: str = "") -> T:
    """A value that was read, of a type as `read_json` takes it.

    Args:
        place: begins the message.

    Raises:
        Unreadable: it is of another type.
    """
    return checked(kind, value, lambda keys: 0, functools.partial(unreadable, place, remedy))


def checked(kind: Any, value: Any, line_of: Callable[[tuple[str | int, ...]], int],
            fault: Callable[[int, str], Unreadable]) -> Any:
    """A value that was read, of a type as `read_json` takes it.

    Args:
        line_of: line of a value by its keys.
        fault: error at a line, with the rule.
    """
    if kind is Any:
        return value
    try:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind.model_validate(value)
        if is_dataclass(kind):
            return _adapter(kind).validate_json(json.dumps(value), strict=True)
        _adapter(kind).validate_python(value, strict=True)
        return value
    except ValidationError as error:
        first = error.errors()[0]
        keys = ".".join(map(str, first["loc"]))
        said = (f"{keys} is missing" if first["type"] == "missing"
                else f"{keys or 'it'}={shown(first['input']):.80}: {rule_of(first)}")
        if not keys and first["type"] == "value_error":  # of all of it
            said = rule_of(first)
        more = error.error_count() - 1
        raise fault(line_of(first["loc"]),
                    said + (f" (and {more} more)" if more else "")) from None


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter:
    return TypeAdapter(kind)


def shown(value: Any) -> str:
    """A value that was read, for a message; a date as YAML has it."""
    return value.isoformat() if isinstance(value, date) else repr(value)


def rule_of(error: ErrorDetails) -> str:
    """The rule that a value breaks, as pydantic says it, and what to write instead where that is
    known."""
    rule, value = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] in ("model_type", "dict_type"):
        rule = "input should be a mapping of keys to values"
    elif error["type"] == "string_type" and isinstance(value, int | float | date):
        rule += ", and YAML reads this one otherwise; write it in quotes"
    elif error["type"] == "list_type" and isinstance(value, str | int | float | date):
        rule += "; write it in brackets, [...]"
    return f"{rule[:1].lower()}{rule[1:]}"
