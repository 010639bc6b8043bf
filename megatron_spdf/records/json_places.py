"""Places in a text of JSON: of a value by its keys, and of what a reader refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_spdf.records import limits

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?|[\[\]{},]|[^\s"\[\]{},]+', re.DOTALL)


def _places(text: str) -> Iterator[tuple[tuple[str | int, ...], re.Match]]:
    """Tokens of a JSON text with the keys of the value that they belong to."""
    keys: list[Any] = []
    for token in _TOKEN.finditer(text):
        first = token[0][0]
        if token[1]:
            keys[-1] = json.loads(token[0][:-len(token[1])], strict=False)
        yield tuple(keys), token
        if first in "[{":
            keys.append(0 if first == "[" else None)
        elif first in "]}":
            keys.pop()
        elif first == "," and isinstance(keys[-1], int):
            keys[-1] += 1


def reason(text: str, constants: bool) -> tuple[int, str]:
    """Lines before what is refused in a text that is JSON otherwise, and the rule."""
    seen: set[tuple[str | int, ...]] = set()
    for keys, token in _places(text):
        rule = ""
        if len(keys) > limits.MOST_NESTING:
            rule = f"nested more than {limits.MOST_NESTING} deep"
        elif token[1] and keys in seen:
            rule = f"the key {keys[-1]!r} is given twice; keep one of them"
        elif not constants and token[0][0] not in '"[]{},:tfn' and not math.isfinite(
                float(token[0])):
            digits = token[0].removeprefix("-")
            rule = (f"a number of {len(digits):,} digits" if digits.isdigit()
                    else f"{'.'.join(map(str, keys))}={token[0]} is not a finite number")
        if rule:
            return text.count("\n", 0, token.start()), rule
        if token[1]:
            seen.add(keys)
    return 0, ""


def lines_before(text: str, keys: tuple[str | int, ...]) -> int:
    """Lines before the value of the keys, or of the first of them that are there."""
    place, known = 0, 0
    for there, token in _places(text):
        if len(there) > known and there == keys[:len(there)]:
            place, known = token.start(), len(there)
    return text.count("\n", 0, place)
