"""Small helpers for messages."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Of its message, for the log."""
    return (str(error).strip().splitlines() or [""])[0][:200]
