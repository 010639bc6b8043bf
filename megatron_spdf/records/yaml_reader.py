"""Reader of YAML: bounded, without ambiguity, of the types asked for."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_spdf.records import limits
from megatron_spdf.records.values import checked, decoded, read_bytes, unreadable

T = TypeVar("T")
_TEXT, *_NUMBERS = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))
_OCTAL = re.compile("[-+]?0[0-7_]+")


def read_yaml(path: str | Path, kind: type[T] = Any, remedy: str = "") -> T:
    """Reads a YAML file, as `read_json` does; nothing for an empty one."""
    return parse_yaml(read_bytes(path, limits.MOST_YAML_BYTES, remedy), kind, str(path), remedy)


def parse_yaml(text: str | bytes, kind: type[T] = Any, name: str = "the text",
               remedy: str = "") -> T:
    """Reads YAML, as `read_yaml` does."""
    fault, text = functools.partial(unreadable, name, remedy), decoded(text, name, remedy)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node:
            _weigh(node, {}, loader)
        value = loader.construct_document(node) if node else None
    except _Refused as error:
        raise fault(error.problem_mark.line + 1, error.problem) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise fault(mark.line + 1 if mark else 1,
                    f"not YAML ({error.problem or error.context})") from None
    except yaml.reader.ReaderError as error:
        raise fault(text.count("\n", 0, error.position) + 1,
                    f"not YAML (the character {error.character:#x} is not allowed)") from None
    return checked(kind, value, lambda keys: _yaml_line(node, keys), fault)


class _Loader(yaml.SafeLoader):
    """Loader of plain values that refuses what nests too deep."""

    nested = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.nested += 1
        if self.nested > limits.MOST_NESTING:
            raise _Refused(f"nested more than {limits.MOST_NESTING} deep", self.peek_event())
        node = super().compose_node(parent, index)
        self.nested -= 1
        _read_as_written(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]  # PyYAML's constructors take a value for granted
            raise _Refused(f"{node.value!r:.60} cannot be read as {kind}", node) from None


class _Refused(yaml.MarkedYAMLError):
    """Raised at a node, or an event, that is YAML but refused."""

    def __init__(self, rule: str, place: Any):
        super().__init__(problem=rule, problem_mark=place.start_mark)


def _read_as_written(node: yaml.Node) -> None:
    """Undoes the numbers of YAML 1.1 that are none to whoever writes them: 2:4 is a text and not
    the 124 of base 60, as in YAML 1.2, and 010, once 8 and now 10, is refused."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _NUMBERS:
        return
    if ":" in node.value:
        node.tag = _TEXT
    elif _OCTAL.fullmatch(node.value):
        raise _Refused(f"some read {node.value} by base 8; write the number without leading "
                       "zeros, or a text in quotes", node)


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int]],
           loader: _Loader) -> tuple[int, int]:
    """Number of values of a node and their nesting, with aliases written out; refuses too much of
    either, and keys that are given twice."""
    if id(node) in known:
        if not known[id(node)]:
            raise _Refused("a value that holds itself", node)
        return known[id(node)]
    known[id(node)] = ()
    pairs = isinstance(node, yaml.MappingNode)
    if pairs:
        _require_unique(node, loader)
    inner = [] if isinstance(node, yaml.ScalarNode) else [
        _weigh(child, known, loader)
        for item in node.value for child in (item if pairs else [item])]
    size, depth = 1 + sum(s for s, _ in inner), 1 + max((d for _, d in inner), default=0)
    if size > limits.MOST_YAML_VALUES:
        raise _Refused(f"over {limits.MOST_YAML_VALUES:,} values, aliases written out", node)
    if depth > limits.MOST_NESTING:
        raise _Refused(f"nested more than {limits.MOST_NESTING} deep", node)
    known[id(node)] = size, depth
    return size, depth


def _require_unique(node: yaml.MappingNode, loader: _Loader) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            merge = key.tag == "tag:yaml.org,2002:merge"
            name = key.value if merge else loader.construct_object(key)
            if not isinstance(name, Hashable):
                raise _Refused(f"{key.value!r:.60} cannot be a key", key)
            if name in seen:
                raise _Refused(f"the key {key.value!r} is given twice; keep one of them", key)
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
