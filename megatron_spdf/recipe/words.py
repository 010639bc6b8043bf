"""`section.key=value` words of a command line, no key in two of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_spdf.recipe.load import read_value, write_value
from megatron_spdf.sparsity.settings import normalize_sparsity
from megatron_spdf.text import printable


class _Overrides(argparse.Action):
    """Stores words that give no key twice."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            require_given_once(values)
        except ValueError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, values)


def add_overrides(parser: argparse.ArgumentParser, meaning: str = "values that win over the "
                  "recipe's") -> None:
    """Adds `section.key=value` words; a parser that also has options needs
    `parse_intermixed_args`."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                        action=_Overrides, help=f"{meaning}; each key is given once")


def require_given_once(words: Sequence[str]) -> None:
    """Raises a ValueError where two words give a value to one key: which of the two was meant,
    nobody knows."""
    given: dict[str, str] = {}
    for word in words:
        for key in values_of(word):
            for other, before in given.items():
                if _overlap(key, other):
                    raise ValueError(printable(f"{key} is given twice, by {before:.80} and "
                                               f"{word:.80}; give it once"))
        given |= dict.fromkeys(values_of(word), word)


def overruled_by(words: Sequence[str], stronger: Sequence[str]) -> list[str]:
    """Words less the values of keys that stronger words give, and then the stronger ones."""
    keys = [key for word in stronger for key in values_of(word)]
    return [*_without(words, keys), *stronger]


def _without(words: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    for word in words:
        values = values_of(word)
        left = {key: value for key, value in values.items()
                if not any(_overlap(key, other) for other in keys)}
        if len(left) == len(values):
            yield word
        else:
            yield from (f"{key}={write_value(value)}" for key, value in left.items())


def first_given(words: Sequence[str], keys: Iterable[str]) -> str:
    """The first of some keys that a word gives, in whole or in part; empty: none."""
    given = [key for word in words for key in values_of(word)]
    return min((key for key in keys if any(_overlap(key, other) for other in given)), default="")


def values_of(word: str) -> dict[str, Any]:
    """Key in full -> value, for everything that a word gives. `sparsity=0.5` gives
    `sparsity.level`; a word that is wrong gives what it begins with, and is refused later."""
    name, _, text = word.partition("=")
    try:
        value = read_value(text)
    except ValueError:
        value = text
    return dict(_flat(name, normalize_sparsity(value) if name == "sparsity" else value))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    else:
        yield name, value


def _overlap(key: str, other: str) -> bool:
    """True if one key is the other, or inside it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")
