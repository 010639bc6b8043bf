"""Reader of JSON and YAML, and writer of JSON: bounded, without ambiguity, of the types asked for.

    run = read_json(directory / "run.json", Run)       # a TypedDict or any other type
    values = read_yaml(path, dict[str, Any])
    for step in json_lines(log, Step): ...
    record = foreign_record(line)                      # of a corpus: what nobody reads may be odd

What is wrong is said with the file, the line, the key and the rule.
"""

from __future__ import annotations

import codecs
import functools
import json
import math
import os
import re
import stat
from collections.abc import Hashable, Iterator
from dataclasses import is_dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")
# Tokenizers of large vocabularies are the largest files: 35 MB, two million values.
MOST_BYTES, MOST_VALUES = 1 << 27, 1 << 23
# PyYAML reads some 100 KB a second
MOST_YAML_BYTES, MOST_YAML_VALUES = 1 << 20, 100_000
MOST_LINE_BYTES = 1 << 24
MOST_NESTING = 64
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?|[\[\]{},]|[^\s"\[\]{},]+', re.DOTALL)
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class Unreadable(ValueError):
    """Raised if a file or a text cannot be read as what it should be."""


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
    return parse_json(read_bytes(path, MOST_BYTES, remedy), kind, str(path), constants=constants,
                      remedy=remedy)


def parse_json(text: str | bytes, kind: type[T] = Any, name: str = "the text", line: int = 1,
               constants: bool = False, remedy: str = "") -> T:
    """Reads JSON, as `read_json` does.

    Args:
        name, line: of the place, for the message.
    """
    fault = functools.partial(_fault, name, remedy)
    text = _decoded(text, name, remedy)
    try:
        value = _json(text, constants)
    except json.JSONDecodeError as error:
        raise fault(line + error.lineno - 1,
                    f"not JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # ValueError: of `int`, or ours
        place, rule = (0, str(error)) if str(error) and isinstance(error, _Refused) else _reason(
            text, constants)
        raise fault(line + place, rule or str(error)) from None
    return _typed(kind, value, lambda keys: line + _line_of(text, keys), fault)


def json_lines(path: str | Path, kind: type[T] = Any, constants: bool = False, remedy: str = "",
               cut_short: bool = False) -> Iterator[tuple[str, T]]:
    """Reads a file with a JSON value a line, each with its place; blank lines are passed over.

    Args:
        cut_short: whether a last line without its end is left out, which a writer may have been
            stopped in.
    """
    with _open(Path(path), remedy) as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise _fault(str(path), remedy, number, f"over {MOST_LINE_BYTES:,} bytes long")
            if cut_short and not line.endswith(b"\n"):
                return
            if line.strip():
                yield (f"{path}, line {number}",
                       parse_json(line, kind, str(path), number, constants, remedy))


def read_yaml(path: str | Path, kind: type[T] = Any, remedy: str = "") -> T:
    """Reads a YAML file, as `read_json` does; nothing for an empty one."""
    return parse_yaml(read_bytes(path, MOST_YAML_BYTES, remedy), kind, str(path), remedy)


def parse_yaml(text: str | bytes, kind: type[T] = Any, name: str = "the text",
               remedy: str = "") -> T:
    """Reads YAML, as `read_yaml` does."""
    fault, text = functools.partial(_fault, name, remedy), _decoded(text, name, remedy)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node:
            _weigh(node, {}, loader)
        value = loader.construct_document(node) if node else None
    except _RefusedYaml as error:
        raise fault(error.problem_mark.line + 1, error.problem) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise fault(mark.line + 1 if mark else 1,
                    f"not YAML ({error.problem or error.context})") from None
    except yaml.reader.ReaderError as error:
        raise fault(text.count("\n", 0, error.position) + 1,
                    f"not YAML (the character {error.character:#x} is not allowed)") from None
    return _typed(kind, value, lambda keys: _yaml_line(node, keys), fault)


def foreign_record(line: bytes) -> Any:
    """Reads one JSON value of a corpus, of which only some keys are of interest.

    What nests deeper than `MOST_NESTING` becomes None, a number of thousands of digits infinity,
    and a key that is given twice has a `DuplicateKey`, which is none of the values that anyone
    takes.

    Raises:
        Unreadable: it is not UTF-8, or not JSON.
    """
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
        try:
            value = _FOREIGN.decode(text)
            shallow = not _too_deep(value)
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


def typed(value: Any, kind: type[T], place: str, remedy: str = "") -> T:
    """A value that was read, of a type as `read_json` takes it.

    Args:
        place: begins the message.

    Raises:
        Unreadable: it is of another type.
    """
    return _typed(kind, value, lambda keys: 0, functools.partial(_fault, place, remedy))


class DuplicateKey:
    """Values that a key is given in one object of a corpus."""

    def __init__(self, *values: Any):
        self.values = values

    def __repr__(self) -> str:
        return f"given {len(self.values)} times: {', '.join(map(repr, self.values))}"


def describe(value: Any) -> str:
    """What a value of a corpus is, where it is not what it should be."""
    return repr(value) if isinstance(value, DuplicateKey) else f"a {type(value).__name__}"


def to_json(value: Any, **options: Any) -> str:
    """JSON of a value; numbers that are not finite, which JSON does not have, become null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {_finite(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_bytes(path: str | Path, most: int, remedy: str = "") -> bytes:
    """Reads a regular file of at most so many bytes.

    Raises:
        Unreadable: it is none, or larger.
        OSError: it cannot be opened.
    """
    with _open(Path(path), remedy) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _fault(str(path), remedy, 0, f"over {most:,} bytes long")
    return content


# Files

def _open(path: Path, remedy: str):
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not hang
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _fault(str(path), remedy, 0, "no regular file")
    return open(handle, "rb")


def _decoded(text: str | bytes, name: str, remedy: str) -> str:
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise _fault(name, remedy, text.count(b"\n", 0, error.start) + 1,
                     f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def _fault(name: str, remedy: str, line: int, rule: str) -> Unreadable:
    place = f"{name}, line {line}" if line else name
    return Unreadable(f"{place}: {rule}{'; ' if remedy else ''}{remedy}")


# Types

@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter:
    return TypeAdapter(kind)


def _typed(kind: Any, value: Any, line_of: Any, fault: Any) -> Any:
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


# JSON

class _Refused(ValueError):
    """Raised where a JSON text has what is refused; `_reason` finds it."""


def _json(text: str, constants: bool) -> Any:
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise _Refused(f"over {MOST_VALUES:,} values")
    value = (_WITH_CONSTANTS if constants else _STRICT).decode(text)
    if _too_deep(value):
        raise _Refused
    if _HALF_OF_A_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Refused("half of a surrogate pair in a text") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refused
    return found


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key in found:
            if len(values := [value for name, value in pairs if name == key]) > 1:
                found[key] = DuplicateKey(*values)
    return found


def _refuse(token: str) -> Any:
    raise _Refused


def _number(token: str) -> float:
    return number if math.isfinite(number := float(token)) else _refuse(token)


def _number_or_none(token: str) -> float | None:
    return number if math.isfinite(number := float(token)) else None


def _is_large(token: str) -> bool:
    """Whether a whole number is beyond all floats, which have up to 309 digits."""
    return len(token) > 300 and not math.isfinite(float(token))


def _integer(token: str) -> int:
    return _refuse(token) if _is_large(token) else int(token)


def _integer_or_none(token: str) -> int | None:
    return None if _is_large(token) else int(token)


def _integer_or_infinity(token: str) -> int | float:
    return float(token) if _is_large(token) else int(token)


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_number,
                           parse_int=_integer)
_WITH_CONSTANTS = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=lambda token: None,
                                   parse_float=_number_or_none, parse_int=_integer_or_none)
_FOREIGN = json.JSONDecoder(object_pairs_hook=_marked)
_LONG_NUMBERS = json.JSONDecoder(object_pairs_hook=_marked, parse_int=_integer_or_infinity)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_NESTING):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return any(isinstance(value, (dict, list)) for value in level)


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


def _reason(text: str, constants: bool) -> tuple[int, str]:
    """Lines before what is refused in a text that is JSON otherwise, and the rule."""
    seen: set[tuple[str | int, ...]] = set()
    for keys, token in _places(text):
        rule = ""
        if len(keys) > MOST_NESTING:
            rule = f"nested more than {MOST_NESTING} deep"
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


def _line_of(text: str, keys: tuple[str | int, ...]) -> int:
    """Lines before the value of the keys, or of the first of them that are there."""
    place, known = 0, 0
    for there, token in _places(text):
        if len(there) > known and there == keys[:len(there)]:
            place, known = token.start(), len(there)
    return text.count("\n", 0, place)


def _shallow(text: str) -> str:
    """A JSON text with null for what nests too deep."""
    kept, start, closing = [], 0, []
    for token in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', text, re.DOTALL):
        if token[0] in "[{":
            closing.append("]" if token[0] == "[" else "}")
            if len(closing) == MOST_NESTING + 1:
                kept += text[start:token.start()], "null"
        elif token[0] in "]}":
            if not closing or closing.pop() != token[0]:
                raise ValueError(f"{token[0]} at character {token.start()} closes nothing")
            if len(closing) == MOST_NESTING:
                start = token.end()
    if len(closing) > MOST_NESTING:
        raise ValueError(f"{len(closing)} brackets are not closed")
    return "".join([*kept, text[start:]])


# YAML

class _Loader(yaml.SafeLoader):
    """Loader of plain values that refuses what nests too deep."""

    nested = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.nested += 1
        if self.nested > MOST_NESTING:
            raise _RefusedYaml(f"nested more than {MOST_NESTING} deep", self.peek_event())
        node = super().compose_node(parent, index)
        self.nested -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]  # PyYAML's constructors take a value for granted
            raise _RefusedYaml(f"{node.value!r:.60} cannot be read as {kind}", node) from None


class _RefusedYaml(yaml.MarkedYAMLError):
    """Raised at a node, or an event, that is YAML but refused."""

    def __init__(self, rule: str, place: Any):
        super().__init__(problem=rule, problem_mark=place.start_mark)


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int]],
           loader: _Loader) -> tuple[int, int]:
    """Number of values of a node and their nesting, with aliases written out; refuses too much of
    either, and keys that are given twice."""
    if id(node) in known:
        if not known[id(node)]:
            raise _RefusedYaml("a value that holds itself", node)
        return known[id(node)]
    known[id(node)] = ()
    pairs = isinstance(node, yaml.MappingNode)
    if pairs:
        _require_unique(node, loader)
    inner = [] if isinstance(node, yaml.ScalarNode) else [
        _weigh(child, known, loader)
        for item in node.value for child in (item if pairs else [item])]
    size, depth = 1 + sum(s for s, _ in inner), 1 + max((d for _, d in inner), default=0)
    if size > MOST_YAML_VALUES:
        raise _RefusedYaml(f"over {MOST_YAML_VALUES:,} values, aliases written out", node)
    if depth > MOST_NESTING:
        raise _RefusedYaml(f"nested more than {MOST_NESTING} deep", node)
    known[id(node)] = size, depth
    return size, depth


def _require_unique(node: yaml.MappingNode, loader: _Loader) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            merge = key.tag == "tag:yaml.org,2002:merge"
            name = key.value if merge else loader.construct_object(key)
            if not isinstance(name, Hashable):
                raise _RefusedYaml(f"{key.value!r:.60} cannot be a key", key)
            if name in seen:
                raise _RefusedYaml(f"the key {key.value!r} is given twice; keep one of them", key)
            seen.add(name)


def _yaml_line(node: yaml.Node | None, keys: tuple[str | int, ...]) -> int:
    """Line of the value of the keys, or of the first of them that are there."""
    line = node.start_mark.line + 1 if node else 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [value for name, value in node.value if name.value == str(key)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            found = node.value[key:key + 1]
        else:
            found = []
        if not found:
            break
        node = found[0]
        line = node.start_mark.line + 1
    return line
