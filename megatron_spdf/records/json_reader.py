"""Reader of JSON: bounded, without ambiguity, of the types asked for.

    run = read_json(directory / "run.json", Run)       # a TypedDict or any other type
    for place, step in json_lines(log, Step): ...

What is wrong is said with the file, the line, the key and the rule.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from megatron_spdf.records import limits
from megatron_spdf.records.json_places import lines_before, reason
from megatron_spdf.records.values import checked, decoded, open_regular, read_bytes, unreadable

T = TypeVar("T")
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | Path, kind: type[T] = Any, constants: bool = False,
              remedy: str = "") -> T:
    """Reads a JSON file.

    Args:
        kind: type of its content: a pydantic model or a dataclass is made, of any other type the
            content is returned as it is.
        constants: whether NaN and Infinity, which JSON does not have, are read, as null; as are
            numbers beyond all floats.
        remedy: for the message.

    Raises:
        Unreadable: it is too large, not UTF-8, not JSON, ambiguous, or of another type.
        OSError: it cannot be opened.
    """
    return parse_json(read_bytes(path, limits.MOST_BYTES, remedy), kind, str(path),
                      constants=constants, remedy=remedy)


def parse_json(text: str | bytes, kind: type[T] = Any, name: str = "the text", line: int = 1,
               constants: bool = False, remedy: str = "") -> T:
    """Reads JSON, as `read_json` does.

    Args:
        name, line: name of the text and line of its start, for the message.
    """
    fault = functools.partial(unreadable, name, remedy)
    text = decoded(text, name, remedy)
    try:
        value = _json(text, constants)
    except json.JSONDecodeError as error:
        raise fault(line + error.lineno - 1,
                    f"not JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # ValueError: of `int`, or ours
        place, rule = (0, str(error)) if str(error) and isinstance(error, _Refused) else reason(
            text, constants)
        raise fault(line + place, rule or str(error)) from None
    return checked(kind, value, lambda keys: line + lines_before(text, keys), fault)


def json_lines(path: str | Path, kind: type[T] = Any, constants: bool = False, remedy: str = "",
               cut_short: bool = False) -> Iterator[tuple[str, T]]:
    """Reads a file with a JSON value a line, each with its place; blank lines are passed over.

    Args:
        cut_short: whether a last line without its end is left out, which a writer may have been
            stopped in.
    """
    with open_regular(Path(path), remedy) as file:
        number = 0
        while line := file.readline(limits.MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > limits.MOST_LINE_BYTES:
                raise unreadable(str(path), remedy, number,
                                 f"over {limits.MOST_LINE_BYTES:,} bytes long")
            if cut_short and not line.endswith(b"\n"):
                return
            if line.strip():
                yield (f"{path}, line {number}",
                       parse_json(line, kind, str(path), number, constants, remedy))


class _Refused(ValueError):
    """Raised where a JSON text has what is refused; `reason` finds it."""


def _json(text: str, constants: bool) -> Any:
    if sum(map(text.count, ",[{")) > limits.MOST_VALUES:
        raise _Refused(f"over {limits.MOST_VALUES:,} values")
    value = (_WITH_CONSTANTS if constants else _STRICT).decode(text)
    if too_deep(value):
        raise _Refused
    if _HALF_OF_A_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Refused("half of a surrogate pair in a text") from None
    return value


def too_deep(value: Any) -> bool:
    """True if lists and mappings nest deeper than is read."""
    level = [value]
    for _ in range(limits.MOST_NESTING):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return any(isinstance(value, (dict, list)) for value in level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refused
    return found


def _refuse(token: str) -> Any:
    raise _Refused


def _number(token: str) -> float:
    return number if math.isfinite(number := float(token)) else _refuse(token)


def _number_or_none(token: str) -> float | None:
    return number if math.isfinite(number := float(token)) else None


def is_large(token: str) -> bool:
    """True if a whole number is beyond all floats, which have up to 309 digits."""
    return len(token) > 300 and not math.isfinite(float(token))


def _integer(token: str) -> int:
    return _refuse(token) if is_large(token) else int(token)


def _integer_or_none(token: str) -> int | None:
    return None if is_large(token) else int(token)


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_number,
                           parse_int=_integer)
_WITH_CONSTANTS = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=lambda token: None,
                                   parse_float=_number_or_none, parse_int=_integer_or_none)
