"""Reader of a corpus's JSON: what nobody reads of it may be odd."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from megatron_spdf.records import limits
from megatron_spdf.records.json_reader import is_large, too_deep
from megatron_spdf.records.values import Unreadable


def foreign_record(line: bytes) -> Any:
    """Reads one JSON value of a corpus, of which only some keys are of interest.

    What nests deeper than `limits.MOST_NESTING` becomes None. A whole number beyond all floats
    becomes infinity. A key that is given twice has a `DuplicateKey`, which no reader takes for a
    value.

    Raises:
        Unreadable: it is not UTF-8, or not JSON.
    """
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
        try:
            value = _FOREIGN.decode(text)
            shallow = not too_deep(value)
        except json.JSONDecodeError:
            raise
        except (RecursionError, ValueError):
            shallow = False
        return value if shallow else _LONG_NUMBERS.decode(_shallow(text))
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8: 0x{error.object[error.start]:02x} at byte {error.start} of "
                         "it") from None
    except ValueError as error:
        raise Unreadable(f"not valid JSON: {error}") from None


class DuplicateKey:
    """Values that a key is given in one object of a corpus."""

    def __init__(self, *values: Any):
        self.values = values

    def __repr__(self) -> str:
        return f"given {len(self.values)} times: {', '.join(map(repr, self.values))}"


def describe(value: Any) -> str:
    """What a value of a corpus is, where it is not what it should be."""
    return repr(value) if isinstance(value, DuplicateKey) else f"a {type(value).__name__}"


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key in found:
            if len(values := [value for name, value in pairs if name == key]) > 1:
                found[key] = DuplicateKey(*values)
    return found


def _integer_or_infinity(token: str) -> int | float:
    return float(token) if is_large(token) else int(token)


_FOREIGN = json.JSONDecoder(object_pairs_hook=_marked)
_LONG_NUMBERS = json.JSONDecoder(object_pairs_hook=_marked, parse_int=_integer_or_infinity)


def _shallow(text: str) -> str:
    """A JSON text with null for what nests too deep."""
    kept, start, closing = [], 0, []
    for token in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', text, re.DOTALL):
        if token[0] in "[{":
            closing.append("]" if token[0] == "[" else "}")
            if len(closing) == limits.MOST_NESTING + 1:
                kept += text[start:token.start()], "null"
        elif token[0] in "]}":
            if not closing or closing.pop() != token[0]:
                raise ValueError(f"{token[0]} at character {token.start()} closes nothing")
            if len(closing) == limits.MOST_NESTING:
                start = token.end()
    if len(closing) > limits.MOST_NESTING:
        raise ValueError(f"{len(closing)} brackets are not closed")
    return "".join([*kept, text[start:]])
