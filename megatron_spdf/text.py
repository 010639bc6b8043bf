"""Small helpers for messages."""

from __future__ import annotations

import re


def first_line(error: Exception) -> str:
    """Of its message, for the log."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def lines_of(text: str) -> list[str]:
    """The lines of a text file, which end at LF or CR LF and nowhere else: what else
    `str.splitlines` takes for an end, such as U+2028, is text."""
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def in_one_line(text: str) -> str:
    """The text with a blank for each end of a line inside of it, as other programs see them."""
    return " ".join(re.split("\r\n|\r|\n", text.removesuffix("\n")))


def printable(text: str) -> str:
    """A text with a question mark for each character that cannot be printed, such as those that a
    terminal obeys."""
    return "".join(c if c.isprintable() else "?" for c in text)


def any_layer(name: str) -> str:
    """Name of a weight with a star for the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
