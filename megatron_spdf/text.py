"""Small helpers for messages."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Of its message, for the log."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def any_layer(name: str) -> str:
    """Name of a weight with a star for the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def shown(name: str, most: int = 100) -> str:
    """Name that a stranger gave, for a message: so many characters of it, and quoted where some of
    them are for the terminal."""
    short = name if len(name) <= most else name[:most] + "..."
    return short if short.isprintable() else repr(short)
