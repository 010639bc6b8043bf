"""Reads a pickle as data: no class that it names is looked up, and nothing that it asks for is
called.

A class or function is a `Name`, and the object that it would make a `Record`. Only plain values,
lists and dictionaries become what they are. A set becomes a list, so that nothing is hashed or
compared that a stranger has nested.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import IO, Any

MOST_BYTES = 256 << 20  # of a pickle: some ten times the index of the largest models
_MOST_OPCODES, _MOST_MARKS = 30_000_000, 100


class NotData(ValueError):
    """Raised if a pickle holds anything but the data that were expected, or ends too early."""


class Forbidden(NotData):
    """Raised if a pickle asks for more than data: it could run code."""


@dataclass(frozen=True, slots=True)
class Name:
    """Class or function, as module and name with a dot between them."""

    full: str


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """Object of a class, or result of a function, that was not made.

    Attributes:
        kind: name of the class or function.
        arguments: of the call.
        state: that was to be set afterwards; None if there is none.
    """

    kind: str
    arguments: tuple
    state: Any = None


def read_pickle(stream: IO[bytes], allowed: Collection[str],
                make: Callable[[str, tuple], Any] = Record,
                persistent: Callable[[Any], Any] | None = None) -> Any:
    """Reads one pickle.

    Args:
        stream: is left behind the pickle.
        allowed: full names of the classes and functions that it may mention.
        make: result of a call, by the full name and the arguments.
        persistent: object of a persistent id; None: there may be none.

    Raises:
        NotData: it mentions another class, is no pickle, or is larger or deeper than any of ours.
    """
    try:
        return _Reader(allowed, make, persistent).read(stream)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError,
            ValueError) as error:
        if isinstance(error, NotData):
            raise
        raise NotData(f"it cannot be read ({type(error).__name__})") from None


class _Reader:
    def __init__(self, allowed: Collection[str], make: Callable[[str, tuple], Any],
                 persistent: Callable[[Any], Any] | None):
        self.allowed, self.make, self.persistent = allowed, make, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self, stream: IO[bytes]) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):
            if number > _MOST_OPCODES:
                raise NotData(f"it has more than {_MOST_OPCODES:,} opcodes")
            if opcode.name in _PUSHED:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise Forbidden(f"it has the opcode {opcode.name}")
        return self.stack.pop()

    def mark(self, _: object) -> None:
        if len(self.marks) == _MOST_MARKS:
            raise NotData(f"it is nested deeper than {_MOST_MARKS}")
        self.marks.append(len(self.stack))

    def popped(self) -> list[Any]:
        """Takes what lies above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def tuple_of(self, count: int | None) -> None:
        items = self.popped() if count is None else self.stack[len(self.stack) - count:]
        if count:
            del self.stack[-count:]
        self.stack.append(tuple(items))

    def name(self, full: str) -> None:
        if full not in self.allowed:
            raise Forbidden(f"it wants {full[:100]!r}")
        self.stack.append(Name(full))

    def name_on_stack(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{_of(str, module)}.{_of(str, name)}")

    def call(self, _: object) -> None:
        arguments, function = _of(tuple, self.stack.pop()), _of(Name, self.stack.pop()).full
        if function == "collections.OrderedDict" and not arguments:
            self.stack.append({})
        elif function == "torch.Size" and len(arguments) == 1:
            self.stack.append(_of(tuple, arguments[0]))
        else:
            self.stack.append(self.make(function, arguments))

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record) and target.state is None:
            target.state = state
        elif not isinstance(target, dict):  # of a dictionary, attributes that nobody needs
            raise Forbidden("it sets the state of " + (
                target.full if isinstance(target, Name) else type(target).__name__))

    def set_items(self, items: list[Any]) -> None:
        target = _of(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_of(str | int | float | Record | None, key)] = value

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def append(self, items: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(items)

    def append_one(self, _: object) -> None:
        item = self.stack.pop()
        self.append([item])

    def remember(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def recall(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def persist(self, _: object) -> None:
        if self.persistent is None:
            raise NotData("it has an object with an id")
        self.stack.append(self.persistent(self.stack.pop()))


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise NotData(f"it has {type(value).__name__} where that cannot be")
    return value


_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
           "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list}
_ACTIONS: dict[str, Callable[[_Reader, Any], None]] = {
    "MARK": _Reader.mark, "POP": lambda reader, _: reader.stack.pop(),
    "TUPLE": lambda reader, _: reader.tuple_of(None),
    "TUPLE1": lambda reader, _: reader.tuple_of(1), "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    "LIST": lambda reader, _: reader.stack.append(reader.popped()),
    "FROZENSET": lambda reader, _: reader.stack.append(reader.popped()),
    "GLOBAL": lambda reader, argument: reader.name(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Reader.name_on_stack, "REDUCE": _Reader.call, "NEWOBJ": _Reader.call,
    "BUILD": _Reader.build, "SETITEM": _Reader.set_item,
    "SETITEMS": lambda reader, _: reader.set_items(reader.popped()),
    "APPEND": _Reader.append_one, "APPENDS": lambda reader, _: reader.append(reader.popped()),
    "ADDITEMS": lambda reader, _: reader.append(reader.popped()),
    "MEMOIZE": _Reader.remember, "BINPUT": _Reader.remember, "LONG_BINPUT": _Reader.remember,
    "BINGET": _Reader.recall, "LONG_BINGET": _Reader.recall, "BINPERSID": _Reader.persist}
