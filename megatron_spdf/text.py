"""Small helpers for messages, and the escapes of what strangers wrote in them."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Of its message, for the log."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def printable(text: str) -> str:
    """A text in one line, with an escape such as \\x1b for each character that cannot be printed:
    those that a terminal obeys, that turn the direction of writing, or that are half of a pair."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """`printable` of every line."""
    return "\n".join(map(printable, text.expandtabs().split("\n")))


def label(text: str) -> str:
    """A text as a label of a picture, where matplotlib takes dollar signs for formulas and leaves
    out of a legend what begins with an underscore."""
    plain = printable(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def any_layer(name: str) -> str:
    """Name of a weight with a star for the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def shown(name: str) -> str:
    """Name that a stranger gave, for a message: 100 characters of it, and quoted where some of them
    are for the terminal."""
    short = name if len(name) <= 100 else name[:100] + "..."
    return short if short.isprintable() else repr(short)
