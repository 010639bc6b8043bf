"""Small helpers for messages."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Of its message, for the log."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def printable(text: str) -> str:
    """A text with a question mark for each character that cannot be printed, such as those that a
    terminal obeys."""
    return "".join(c if c.isprintable() else "?" for c in text)


def any_layer(name: str) -> str:
    """Name of a weight with a star for the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
